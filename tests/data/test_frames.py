"""Videos: fewer frames at training than in the shard, with their times, and lengths that are known beforehand."""

from __future__ import annotations

import json

import pytest
import torch
from data_factories import picture
from factories import tiny_llama_tokenizer

from mmit.config import RunConfig
from mmit.conversation import Conversation, ImageRef
from mmit.data import ShardSet, measure_lengths, open_source
from mmit.data.convert import Conversion, convert
from mmit.data.frames import FewerFrames, with_frames
from mmit.images import ImageSpec
from mmit.templates import ChatTemplate
from mmit.tokenizer import prepare_tokenizer
from mmit.train.feed import Encode, plan_stage


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Twelve frames of growing size, two a second, in a shard, with the sentence that tells their times."""
    folder = tmp_path_factory.mktemp("video")
    frames = folder / "videos" / "a"
    frames.mkdir(parents=True)
    for number in range(12):
        (frames / f"{number:03d}.png").write_bytes(picture(8 + number, 6))
    record = {"video": "a.mp4", "QA": [{"q": "What happens?", "a": "A cat jumps."}, {"q": "Then?", "a": "It lands."}]}
    (folder / "qa.json").write_text(json.dumps([record]))
    convert(
        Conversion(
            reader="videoqa",
            source=folder / "qa.json",
            target=folder / "shards",
            name="clips",
            images=folder / "videos",
            options={"frames": 12, "frames_per_second": 2.0, "time_sentence": True},
        ),
        processes=1,
        progress=False,
    )
    return open_source(folder / "shards")


@pytest.fixture(scope="module")
def video(clips: ShardSet) -> Conversation:
    return clips.read(0)


def test_frames_are_spread_evenly_and_keep_their_times(video: Conversation) -> None:
    assert len(video.images) == 12
    fewer = with_frames(video, 4)
    # the middles of four stretches of three frames
    assert fewer.meta["seconds"] == [0.5, 2.0, 3.5, 5.0]
    assert fewer.sizes == tuple((8 + number, 6) for number in (1, 4, 7, 10))
    assert fewer.images == tuple(video.images[number] for number in (1, 4, 7, 10))
    assert fewer.image_refs == tuple(ImageRef(number) for number in range(4))
    assert "The video contains 4 frames sampled at 0.5, 2.0, 3.5, 5.0 seconds." in fewer.messages[0].text
    assert fewer.messages[1:] == video.messages[1:]
    assert with_frames(video, 12) == video


def test_pictures_that_are_no_video_stay(video: Conversation) -> None:
    pictures = Conversation(id="p", messages=video.messages, images=video.images, sizes=video.sizes)
    assert with_frames(pictures, 4) is pictures


@pytest.fixture(scope="module")
def encode(tmp_path_factory: pytest.TempPathFactory) -> Encode:
    half = (0.5, 0.5, 0.5)
    prepared = prepare_tokenizer(tiny_llama_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    template = ChatTemplate.load("vicuna", prepared.tokenizer)
    spec = ImageSpec(size=(8, 8), mean=half, std=half, resize="squash", tokens_per_tile=4)
    return Encode(template, prepared.tokenizer, spec, prepared.image_id, "hf")


def test_a_set_with_fewer_frames_is_measured_and_read_alike(clips: ShardSet, encode: Encode) -> None:
    fewer = FewerFrames(clips, 3)
    sample = encode(fewer.read(0))
    assert sample.pixels.shape == (3, 3, 8, 8)
    assert torch.equal(
        sample.pixels[0], encode.spec.prepare(clips.read(0).images[2])[0]
    )  # the middle of the first four
    assert int((sample.input_ids == encode.image_id).sum()) == 3 * 4
    for source, tiles in ((fewer, 3), (clips, 12)):
        table = measure_lengths(source, encode.measure, fingerprint="f", max_skipped=0, processes=1, progress=False)
        assert table.tiles.tolist() == [tiles]
        assert table.tokens.tolist() == [encode(source.read(0)).length]


def test_a_stage_sees_as_many_frames_as_its_run_file_says(clips: ShardSet, encode: Encode) -> None:
    for frames, tiles in ((None, 12), (5, 5)):
        config = RunConfig.model_validate(
            {
                "name": "video",
                "model": {"path": "none"},
                "stages": {
                    "one": {
                        "train": {"connector": 1e-3},
                        "data": {"mix": [{"shards": str(clips.directory)}], "frames": frames},
                        "batch": {"length": 256, "tokens_per_step": 256},
                    }
                },
            }
        )
        plan = plan_stage(config, config.stages["one"], encode)
        assert plan.tiles.tolist() == [tiles]
        assert len(plan.sources[0].read(0).images) == tiles
