"""Sets of ready conversations, each from records in the form in which it is published, traps included."""

import io
from pathlib import Path

import pytest
from data_factories import picture
from recipe_factories import lay_out, llava_turns, opened, published, shown, write_parquet

from mmit.data.faults import SampleError, SkippedError
from mmit.data.recipe import load_recipe


@pytest.mark.parametrize(
    ("name", "image", "question"),
    [
        ("llava_cc3m_595k", "GCC_train_000000000.jpg", "Give a brief summary.\n<image>"),
        ("llava_pretrain_558k", "00453/004539375.jpg", "Give a brief summary.\n<image>"),
        ("llava_pretrain_558k", "00453/004539375.jpg", "<image>\nGive a brief summary."),
        ("sharegpt4v_cap100k", "coco/train2017/000000000009.jpg", "Give a brief summary.\n<image>"),
        ("sharegpt4v_pt_1246k", "sam/images/sa_1.jpg", "Give a brief summary.\n<image>"),
        ("lvis_instruct4v", "coco/train2017/000000000009.jpg", "<image>\nGive a brief summary."),
    ],
)
def test_the_picture_stands_in_front_wherever_the_placeholder_was(
    tmp_path: Path, name: str, image: str, question: str
) -> None:
    record = {"id": "004539375", "image": image, "conversations": llava_turns(question, "a mattress topper")}
    reader = published(name, tmp_path, [record], {image: (8, 6)})
    assert shown(reader) == ["<0>Give a brief summary.", "a mattress topper"]
    assert reader.read(0).meta == {"id": "004539375"}


def test_llava_instruct_finds_a_coco_picture_under_either_name_and_keeps_repeated_ids_apart(tmp_path: Path) -> None:
    records = [
        {"id": "000000033471", "image": "000000033471.jpg", "conversations": llava_turns("<image>\nA?", "one")},
        {"id": "000000033471", "image": "000000033471.jpg", "conversations": llava_turns("B?\n<image>", "two")},
    ]
    reader = published("llava_instruct_150k", tmp_path, records, {"COCO_train2014_000000033471.jpg": (8, 6)})
    found = [reader.read(number) for number in range(2)]
    assert [one.id for one in found] == ["llava_instruct_150k/00000000", "llava_instruct_150k/00000001"]
    assert [one.meta["id"] for one in found] == ["000000033471"] * 2


BOX_TURNS = llava_turns(
    "<image>\nPlease provide the bounding box coordinate of the region this sentence describes: the cat.",
    "[0.25, 0.375, 0.75, 0.625]",
)


def test_mix665k_states_the_padded_boxes_and_converts_them_when_asked(tmp_path: Path) -> None:
    records = [{"id": "1", "image": "vg/VG_100K/1.jpg", "conversations": BOX_TURNS}]
    pictures = {"vg/VG_100K/1.jpg": (80, 40)}
    reader = published("llava_v1_5_mix665k", tmp_path, records, pictures)
    assert shown(reader)[1] == "[0.25, 0.375, 0.75, 0.625]"
    assert reader.read(0).meta["boxes"] == "xyxy01_padded"
    # 80 x 40 in a square of 80: 20 pixels above; y 0.375 is pixel 30, 10 below the edge, 10 / 40
    reader = published("llava_v1_5_mix665k", tmp_path, None, boxes_to="xyxy01")
    assert shown(reader)[1] == "[0.250, 0.250, 0.750, 0.750]"
    assert reader.read(0).meta["boxes"] == "xyxy01"


def test_mix665k_reads_gif_and_png_in_place_of_jpg_and_text_only(tmp_path: Path) -> None:
    records = [
        {"id": "a", "image": "ocr_vqa/images/1.jpg", "conversations": llava_turns("<image>\nA?", "b")},
        {"id": "b", "image": "ocr_vqa/images/2.jpg", "conversations": llava_turns("<image>\nA?", "b")},
        {"id": "c", "conversations": llava_turns("Hello", "Hi.")},
        {"id": "d", "image": "ocr_vqa/images/4.jpg", "conversations": llava_turns("<image>\nA?", "b")},
        {"id": "e", "image": "ocr_vqa/images/1.jpg", "conversations": llava_turns("<image>\nA?", " ")},
    ]
    gif, png = picture(kind="GIF"), picture(kind="PNG")
    reader = published(
        "llava_v1_5_mix665k", tmp_path, records, {"ocr_vqa/images/1.gif": gif, "ocr_vqa/images/2.jpg": png}
    )
    assert reader.read(0).images == (gif,)
    assert reader.read(1).images == (png,)  # a png called .jpg
    assert reader.read(2).images == ()
    with pytest.raises(SampleError, match=r"'ocr_vqa/images/4\.jpg' is not below .*, nor as .*4\.gif or .*4\.png"):
        reader.read(3)
    with pytest.raises(SampleError, match=r"turn 2 \(assistant\) is empty"):
        reader.read(4)


def test_llava_next_and_onevision_rows_have_a_picture_inside_or_none(tmp_path: Path) -> None:
    rows = [
        {"id": "000000000009", "image": {"bytes": picture(), "path": None}, "data_source": "azure_dc_zh_92K",
         "conversations": llava_turns("<image>\n这幅画中的关键信息有哪些？", "一盘食物。")},
        {"id": "t", "image": None, "data_source": "sharegpt", "conversations": llava_turns("Hello", "Hi.")},
    ]  # fmt: skip
    for name in ("llava_next_data", "llava_onevision_data"):
        folder = load_recipe(name, root=tmp_path).source
        write_parquet(tmp_path / folder / "ai2d(cauldron,llava_format)" / "train-00000-of-00001.parquet", rows)
        reader = published(name, tmp_path, None)
        assert shown(reader) == ["<0>这幅画中的关键信息有哪些？", "一盘食物。"]
        assert reader.read(0).images == (picture(),)
        assert reader.read(1).images == ()
        assert reader.read(1).meta == {"id": "t", "task": "sharegpt"}


def test_onevision_raw_has_several_pictures_and_leaves_videos_out(tmp_path: Path) -> None:
    records = [
        {"id": 1, "image": ["a.jpg", "b.jpg"], "conversations": llava_turns("<image><image>\nWhat changed?", "x")},
        {"id": 2, "video": "c.mp4", "conversations": llava_turns("<image>\nWhat happens?", "y")},
    ]
    reader = published("llava_onevision_raw", tmp_path, records, {"a.jpg": (8, 6), "b.jpg": (6, 8)})
    assert shown(reader) == ["<0><1>What changed?", "x"]
    assert reader.read(0).sizes == ((8, 6), (6, 8))
    with pytest.raises(SkippedError, match="has 'video'"):
        reader.read(1)


def test_lamm_gets_its_picture_a_system_message_and_no_point_clouds(tmp_path: Path) -> None:
    records = [
        {"id": "000000019028", "image": "coco_images/000000019028.jpg", "task_type": "conversation",
         "src_image": "coco2017", "conversations": llava_turns("How is the kitchen furnished?", "In white.")},
        {"pcl": "shapenet_pcls/04256520_4096.npy", "task_type": "classification3d", "src_dataset": "ShapeNet",
         "conversations": llava_turns("What is it?", "A sofa.")},
        {"id": "3", "image": "coco_images/000000019028.jpg",
         "conversations": llava_turns("Find the cup.", "It is at [0.1, 0.2, 0.3, 0.4].")},
    ]  # fmt: skip
    reader = published("lamm", tmp_path, records, {"coco_images/000000019028.jpg": (8, 6)})
    system, question, _ = shown(reader)
    assert system.startswith("Talk with the user about the picture")
    assert question == "<0>How is the kitchen furnished?"
    with pytest.raises(SkippedError, match="has 'pcl'"):
        reader.read(1)
    assert shown(reader, 2)[0] == "Help the user with the picture."  # no task_type
    assert reader.read(2).meta["boxes"] == "xyxy01"
    with pytest.raises(SkippedError):
        published("lamm_3d", tmp_path, records[1:2]).read(0)


def test_vision_flan_finds_escaped_names_and_leaves_the_empty_answer_out(tmp_path: Path) -> None:
    name = "VQA-E+visual_question_answering_574_金 (1), a.jpg"
    records = [
        {"id": "1", "image": name, "task_name": "VQA-E", "conversations": llava_turns("<image>\nWhat?", "Gold.")},
        {"id": "2", "image": name, "task_name": "VQA-E", "conversations": llava_turns("<image>\nWhat?", "")},
    ]
    pictures = {"VQA-E+visual_question_answering_574_#U91d1 (1), a.jpg": (8, 6)}
    reader = published("vision_flan", tmp_path, records, pictures)
    assert shown(reader) == ["<0>What?", "Gold."]
    assert reader.read(0).meta == {"id": "1", "task": "VQA-E"}
    with pytest.raises(SkippedError, match="an answer is empty"):
        reader.read(1)


@pytest.mark.parametrize("name", ["allava_caption_laion", "allava_instruct_laion"])
def test_allava_reads_its_own_layout(tmp_path: Path, name: str) -> None:
    record = {
        "id": "allava_laion_cap_100277305",
        "image": "allava_laion/images/100277305.jpeg",
        "conversations": llava_turns("<image>\nPlease depict the image in words.", "A silver ring."),
        "original_caption": "Leaf Ring",
        "url": "https://example.org/ring.jpg",
    }
    reader = published(name, tmp_path, [record], {"allava_laion/images/100277305.jpeg": (8, 6)})
    assert shown(reader) == ["<0>Please depict the image in words.", "A silver ring."]


@pytest.mark.parametrize("name", ["allava_caption_vflan", "allava_instruct_vflan"])
def test_allava_finds_the_escaped_names_of_vision_flan(tmp_path: Path, name: str) -> None:
    folder = "allava_vflan/images/images_191task_1k"
    record = {"id": "1", "image": f"{folder}/é.png", "conversations": llava_turns("<image>\nWhat?", "A guitar.")}
    assert shown(published(name, tmp_path, [record], {f"{folder}/#U00e9.png": (8, 6)})) == ["<0>What?", "A guitar."]


def test_allava_text_has_idx_and_no_picture(tmp_path: Path) -> None:
    reader = published("allava_text", tmp_path, [{"idx": 7, "conversations": llava_turns("Why?", "Because.")}])
    assert shown(reader) == ["Why?", "Because."]
    assert reader.read(0).meta == {"id": 7}


def test_sharegpt4v_mixture_reads_as_llavas_does(tmp_path: Path) -> None:
    records = [{"id": "1", "image": "vg/VG_100K/1.jpg", "conversations": BOX_TURNS}]
    reader = published("sharegpt4v_mix665k", tmp_path, records, {"vg/VG_100K/1.jpg": (8, 8)})
    assert reader.read(0).meta["boxes"] == "xyxy01_padded"


CAULDRON = {
    "images": [{"bytes": picture(), "path": "a.jpg"}, {"bytes": picture(6, 8), "path": None}],
    "texts": [
        {"user": "Which is red?", "assistant": "Both.", "source": "VQAv2"},
        {"user": "How many?", "assistant": "Two.", "source": "VQAv2"},
    ],
}


def test_the_cauldron_puts_all_pictures_in_front_of_the_first_question(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/the_cauldron/vqav2/train-00000-of-00001.parquet", [CAULDRON])
    reader = published("the_cauldron", tmp_path, None)
    assert shown(reader) == ["<0><1>Which is red?", "Both.", "How many?", "Two."]
    assert reader.read(0).images == (picture(), picture(6, 8))


def test_finevision_leaves_out_single_answers_by_rating_whatever_the_order_of_columns(tmp_path: Path) -> None:
    rated = {**CAULDRON, "relevance_ratings": [1, 5], "relevance_min": 1, "source": "vqav2"}
    low = {**rated, "relevance_ratings": [2, 2], "relevance_min": 2}
    write_parquet(tmp_path / "data/finevision/a/0.parquet", [rated])
    write_parquet(tmp_path / "data/finevision/b/0.parquet", [dict(reversed(low.items()))])
    write_parquet(tmp_path / "data/finevision/c/0.parquet", [{"images": [], "texts": CAULDRON["texts"]}])
    reader = published("finevision", tmp_path, None, min_ratings={"relevance": 3})
    assert shown(reader) == ["<0><1>How many?", "Two."]
    with pytest.raises(SkippedError, match="every answer is rated below"):
        reader.read(1)
    with pytest.raises(SampleError, match="'relevance_ratings' is not a list of one rating for each of 2 answers"):
        reader.read(2)
    assert shown(published("finevision", tmp_path, None), 2) == ["Which is red?", "Both.", "How many?", "Two."]


def test_a_dropped_question_leaves_its_placeholder_to_the_next(tmp_path: Path) -> None:
    turns = llava_turns("<image>\nWhat?", " ", "And?", "Red.")
    reader = published("llava_onevision_raw", tmp_path, [{"image": "a.jpg", "conversations": turns}], {"a.jpg": (8, 6)})
    assert shown(reader) == ["<0>And?", "Red."]
    everything = [{"image": "a.jpg", "conversations": turns[:2]}]
    with pytest.raises(SampleError, match="every answer is empty"):
        published("llava_onevision_raw", tmp_path, everything).read(0)


def test_other_roles_columns_and_places_are_options(tmp_path: Path) -> None:
    turns = [{"from": "Q", "value": "What is in <image> here?"}, {"from": "A", "value": "A cat."}]
    options = {"roles": {"Q": "user", "A": "assistant"}, "columns": {"image": "photo"}, "placeholder": "keep"}
    reader = published(
        "llava_onevision_raw", tmp_path, [{"photo": "a.jpg", "conversations": turns}], {"a.jpg": (8, 6)}, **options
    )
    assert shown(reader) == ["What is in <0> here?", "A cat."]


def test_the_users_own_template_reads_openai_messages(tmp_path: Path) -> None:
    file = io.StringIO()
    file.write(
        '{"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}], '
    )
    file.write('"images": ["cat.jpg"]}\n')
    lay_out(tmp_path, {"data/my_set/records.jsonl": file.getvalue(), "data/my_set/images/cat.jpg": (8, 6)})
    assert shown(opened(load_recipe("custom", root=tmp_path))) == ["<0>What?", "A cat."]
