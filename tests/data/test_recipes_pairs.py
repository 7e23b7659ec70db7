"""Videos as frames with times, and pairs of pictures with the edit between them."""

from pathlib import Path

import pytest
from recipe_factories import lay_out, published, shown

from mmit.data.faults import SampleError, SkippedError

CHAT = {
    "video": "047351_047400/1020861.mp4",
    "QA": [{"i": "", "q": "What is shown?", "a": "A dog."}, {"q": "What does it do?", "a": "It runs."}],
}
FOLDER = "047351_047400/1020861"


def frames(folder: str, count: int, *, times: str | None = None) -> dict:
    found = {f"{folder}/{number:06d}.jpg": (8, number) for number in range(1, count + 1)}
    return {**found, f"{folder}/timestamps.txt": times} if times is not None else found


def test_videochat_keeps_frames_their_times_and_says_them(tmp_path: Path) -> None:
    reader = published("videochat", tmp_path, [CHAT], frames(FOLDER, 2, times="0.0\n2.0\n"))
    assert shown(reader) == [
        "<0><1>The video contains 2 frames sampled at 0.0, 2.0 seconds.\nWhat is shown?",
        "A dog.",
        "What does it do?",
        "It runs.",
    ]
    assert reader.read(0).meta == {"id": CHAT["video"], "video": CHAT["video"], "seconds": [0.0, 2.0]}


def test_frames_are_spread_evenly_over_the_video(tmp_path: Path) -> None:
    pictures = frames(FOLDER, 12)
    reader = published("videochat", tmp_path, [CHAT], pictures, frames=3, frames_per_second=2.0, time_sentence=False)
    # 12 frames in three stretches of four: their middles are 2, 6, 10, which at two a second are 1, 3 and 5 s
    assert [height - 1 for _, height in reader.read(0).sizes] == [2, 6, 10]
    assert reader.read(0).meta["seconds"] == [1.0, 3.0, 5.0]
    assert shown(reader)[0] == "<0><1><2>What is shown?"


@pytest.mark.parametrize(
    ("video", "times", "reason"),
    [
        (CHAT["video"], None, r"timestamps\.txt is missing; write it, or state frames_per_second"),
        (CHAT["video"], "0.0", "1 times for 2 frames"),
        (CHAT["video"], "2.0 0.0", "or not in order"),
        (CHAT["video"], "0.0 x", "could not convert"),
        ("../1.mp4", "0 1", "leads out of the image root"),
    ],
)
def test_frames_without_sure_times_are_bad_records(tmp_path: Path, video: str, times: str | None, reason: str) -> None:
    reader = published("videochat", tmp_path, [{**CHAT, "video": video}], frames(FOLDER, 2, times=times))
    with pytest.raises(SampleError, match=reason):
        reader.read(0)


def test_a_missing_video_is_left_out_or_bad_by_policy(tmp_path: Path) -> None:
    records = [{**CHAT, "video": "gone.mp4"}]
    with pytest.raises(SkippedError, match="a video is missing"):
        published("videochat", tmp_path, records, frames(FOLDER, 1)).read(0)
    with pytest.raises(SampleError, match=r"video 'gone\.mp4' has no folder of frames"):
        published("videochat", tmp_path, records, missing_videos="error").read(0)


def test_videochatgpt_has_one_question_a_record(tmp_path: Path) -> None:
    record = {"q": "What is going on?", "a": "A bath.", "video_id": "v_k_ZXmr8pmrs"}
    reader = published("videochatgpt", tmp_path, [record], frames("v_k_ZXmr8pmrs", 1, times="0"))
    assert shown(reader) == ["<0>The video contains 1 frame sampled at 0.0 seconds.\nWhat is going on?", "A bath."]
    assert reader.read(0).meta["id"] == "v_k_ZXmr8pmrs"


def test_webvid_captions_come_from_a_table(tmp_path: Path) -> None:
    text = "videoid,contentUrl,duration,page_dir,name\n1066674784,https://x.org/a.mp4,PT17S,066001_066050,A dog runs\n"
    reader = published("webvid", tmp_path, text, frames("066001_066050/1066674784", 5, times="0 1 2 3 4"))
    assert shown(reader) == ["<0><1><2><3>Describe the video in one short sentence.", "A dog runs"]
    assert reader.read(0).meta["id"] == "1066674784"


def test_llavas_form_of_a_video_loses_its_placeholder(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<video>\nWhat is shown?"}, {"from": "gpt", "value": "A dog."}]
    record = {"id": 7, "video": CHAT["video"], "conversations": turns}
    reader = published("videochat", tmp_path, [record], frames(FOLDER, 1, times="0"), time_sentence=False)
    assert shown(reader) == ["<0>What is shown?", "A dog."]


def test_videos_are_decoded_with_their_own_times(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    numpy = pytest.importorskip("numpy")
    path = tmp_path / "data/videochat/frames/a.mp4"
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(8):
            frame = av.VideoFrame.from_ndarray(numpy.full((16, 32, 3), 30 * number, numpy.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    reader = published("videochat", tmp_path, [{**CHAT, "video": "a.mp4"}], decode=True, frames=4)
    # eight frames at four a second in stretches of two: 1, 3, 5, 7
    assert reader.read(0).meta["seconds"] == [0.25, 0.75, 1.25, 1.75]
    assert reader.read(0).sizes == ((32, 16),) * 4
    lay_out(tmp_path, {"data/videochat/frames/a.mp4": b"no video"})
    with pytest.raises(SampleError, match=r"video 'a\.mp4' cannot be decoded"):
        reader.read(0)


def edits(prompts: int, seeds: int = 2) -> dict:
    names = [f"{number:07d}" for number in range(prompts)]
    files: dict = {"seeds.json": [[name, [f"{seed}0{name}" for seed in range(seeds)]] for name in names]}
    for number, name in enumerate(names):
        files[f"{name}/prompt.json"] = {"input": "a man", "edit": f"turn him into cyborg {number} ", "output": "x"}
        for seed in range(seeds):
            files |= {f"{name}/{seed}0{name}_{side}.jpg": (8, 6 + side) for side in (0, 1)}
    return files


def test_an_edit_is_the_answer_about_two_pictures(tmp_path: Path) -> None:
    lay_out(tmp_path / "data/instruct_pix2pix/clip-filtered-dataset", edits(20))
    reader = published("instruct_pix2pix", tmp_path, None)
    assert len(reader) == 18  # nine tenths
    assert shown(reader, 3) == ["<0><1>Which edit turns the first picture into the second?", "turn him into cyborg 3"]
    assert reader.read(3).sizes == ((8, 6), (8, 7))  # before, after
    assert reader.read(3).meta == {"id": "0000003/000000003"}
    every = published("instruct_pix2pix", tmp_path, None, split="test", pairs="all")
    assert [every.read(n).meta["id"] for n in range(len(every))] == ["0000019/000000019", "0000019/100000019"]
    (tmp_path / "data/instruct_pix2pix/clip-filtered-dataset/0000003/prompt.json").write_text("{}")
    with pytest.raises(SampleError, match=r"0000003/prompt\.json tells no edit: KeyError"):
        reader.read(3)
