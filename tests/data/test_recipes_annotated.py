"""Annotated sets, each from records in the form in which it is published: questions, choices, votes, boxes."""

from pathlib import Path

import pytest
from recipe_factories import lay_out, published, shown

from mmit.data.faults import SampleError, SkippedError
from mmit.errors import DataError

HEADER = "Figure_path,Question,{answer},Choice A,Choice B,Choice C,Choice D{label}\n"
CHOICES = (
    "What is the uptake pattern in the breast?\n"
    "A. Diffuse uptake pattern\nB. Focal uptake pattern\nC. No uptake pattern\n"
    "D. Cannot determine from the information given\nAnswer with the letter of the right choice."
)


def pmc_row(answer: str, label: str = "") -> str:
    return (
        f"PMC1064097_F1.jpg,What is the uptake pattern in the breast?,{answer},A:Diffuse uptake pattern,"
        f" B:Focal uptake pattern,C:No uptake pattern,D:Cannot determine from the information given{label}\n"
    )


@pytest.mark.parametrize(
    ("name", "spelling", "label", "answer", "letter"),
    [
        ("pmc_vqa", "Anwser", ",Anwser_label", "Focal uptake pattern", ",B"),
        ("pmc_vqa", "Answer", ",Answer_label", "B:Focal uptake pattern", ",B"),
        ("pmc_vqa_v2", "Answer", "", "B", ""),
        ("pmc_vqa_v2", "Answer", "", " B ", ""),
    ],
)
def test_pmc_vqa_gives_one_conversation_from_either_version_and_spelling(
    tmp_path: Path, name: str, spelling: str, label: str, answer: str, letter: str
) -> None:
    text = HEADER.format(answer=spelling, label=label) + pmc_row(answer, letter)
    reader = published(name, tmp_path, text, {"PMC1064097_F1.jpg": (8, 6)})
    assert shown(reader) == ["<0>" + CHOICES, "B. Focal uptake pattern"]


def test_pmc_vqa_refuses_an_answer_that_is_not_the_labelled_choice(tmp_path: Path) -> None:
    text = HEADER.format(answer="Anwser", label=",Anwser_label") + pmc_row("No uptake pattern", ",B") + pmc_row("?", "")
    reader = published("pmc_vqa", tmp_path, text, {"PMC1064097_F1.jpg": (8, 6)})
    with pytest.raises(SampleError, match="its answer 'No uptake pattern' is not choice 'B'"):
        reader.read(0)
    with pytest.raises(SampleError, match="has 7 cells for 8 columns"):
        reader.read(1)


def test_shuffled_choices_keep_the_right_one_right(tmp_path: Path) -> None:
    text = HEADER.format(answer="Answer", label="") + pmc_row("B") * 20
    seen = set()
    for seed in range(8):
        reader = published("pmc_vqa_v2", tmp_path, text, {"PMC1064097_F1.jpg": (8, 6)}, shuffle_choices=True, seed=seed)
        question, answer = shown(reader)
        assert answer in question.splitlines()
        assert answer.endswith(". Focal uptake pattern")
        assert shown(reader) == [question, answer]
        seen.add(answer[0])
    assert len(seen) > 1


def slake(question: str, answer: str, language: str) -> dict:
    return {"img_id": 1, "img_name": "xmlab1/source.jpg", "question": question, "answer": answer, "q_lang": language,
            "modality": "MRI", "answer_type": "OPEN", "triple": ["vhead", "_", "_"], "qid": 0}  # fmt: skip


def test_slake_leaves_the_other_language_out(tmp_path: Path) -> None:
    records = [slake("What modality is used?", "MRI", "en"), slake("这是什么模态?", "核磁", "zh")]
    reader = published("slake", tmp_path, records, {"xmlab1/source.jpg": (8, 6)})
    assert shown(reader) == ["<0>What modality is used?\nAnswer the question briefly.", "MRI"]
    assert reader.read(0).meta == {"id": 0, "answer_type": "OPEN", "modality": "MRI"}
    with pytest.raises(SkippedError, match="'q_lang' is 'zh'"):
        reader.read(1)


def test_lrv_boxes_in_pixels_become_shares_of_the_picture(tmp_path: Path) -> None:
    answer = "The cat is at X:20 Y:10 Width:40 Height:20."
    records = [
        {"image_id": "2392588", "question": "Where is the cat?", "answer": answer, "task": "negative"},
        {"image_id": "2392588", "question": "Where is it?", "answer": "X:900 Y:10 Width:40 Height:20", "task": "x"},
    ]
    reader = published("lrv_instruction", tmp_path, records, {"2392588.jpg": (80, 40)})
    assert shown(reader) == ["<0>Where is the cat?", "The cat is at [0.250, 0.250, 0.750, 0.750]."]
    assert reader.read(0).meta == {"task": "negative", "image_id": "2392588", "boxes": "xyxy01"}
    with pytest.raises(SampleError, match="reaches from 900 to 940 pixels in a picture of 80"):
        reader.read(1)


SCIENCE = {
    "1": {"question": "Which is a mammal?", "choices": ["a frog", "a cat"], "answer": 1, "hint": "", "image": None,
          "lecture": "Mammals\nhave hair.", "solution": "", "split": "train", "subject": "s", "grade": "g"},
    "2": {"question": "Which state is marked?", "choices": ["Ohio", "Utah", "Iowa"], "answer": 0,
          "hint": "See the map.", "image": "image.png", "lecture": "", "solution": "It is Ohio."},
    "3": {"question": "In the test?", "choices": ["a", "b"], "answer": 0, "image": None, "split": "test"},
}  # fmt: skip


def test_scienceqa_has_letters_a_split_and_pictures_for_some(tmp_path: Path) -> None:
    lay_out(tmp_path, {"data/scienceqa/pid_splits.json": {"train": ["2", "1"], "test": ["3"]}})
    reader = published("scienceqa", tmp_path, SCIENCE, {"train/2/image.png": (8, 6)})
    assert len(reader) == 2
    assert shown(reader, 0) == [
        "<0>Which state is marked?\nContext: See the map.\nOptions: (A) Ohio (B) Utah (C) Iowa",
        "It is Ohio.\nThe answer is A.",
    ]
    assert shown(reader, 1) == [
        "Which is a mammal?\nContext: N/A\nOptions: (A) a frog (B) a cat",
        "Mammals\nhave hair.\n\nThe answer is B.",
    ]
    assert reader.read(1).meta["id"] == "1"
    with pytest.raises(DataError, match="has no split 'trial'; it has train, test"):
        published("scienceqa", tmp_path, None, split="trial")


def test_gqa_questions_of_a_picture_are_one_conversation(tmp_path: Path) -> None:
    questions = {
        f"0{n}": {
            "imageId": "2370799" if n != 1 else "5",
            "question": f"Is it {n}?",
            "answer": "no",
            "fullAnswer": "No.",
        }
        for n in range(4)
    }
    reader = published("gqa", tmp_path, questions, {"2370799.jpg": (8, 6)}, max_turns=2)
    form = "{}\nAnswer the question using a single word or phrase."
    assert (len(reader), reader.published) == (3, 4)
    assert shown(reader, 0) == ["<0>" + form.format("Is it 0?"), "no", form.format("Is it 2?"), "no"]
    assert shown(reader, 1) == ["<0>" + form.format("Is it 3?"), "no"]
    with pytest.raises(SampleError, match=r"image '5\.jpg' is not below"):
        reader.read(2)


def vqa_question(number: int, image: int) -> dict:
    return {"image_id": image, "question": f"What is {number}?", "question_id": number}


def vqa_annotation(number: int, answers: list[str], key: str = "answer") -> dict:
    given = [{key: text, "answer_confidence": "yes", "answer_id": n + 1} for n, text in enumerate(answers)]
    return {"question_id": number, "image_id": 9, "multiple_choice_answer": answers[0], "answers": given,
            "answer_type": "other", "question_type": "what is"}  # fmt: skip


@pytest.mark.parametrize("picture", ["COCO_train2014_000000000009.jpg", "000000000009.jpg"])
def test_vqav2_joins_votes_and_groups(tmp_path: Path, picture: str) -> None:
    questions = {"info": {}, "data_subtype": "train2014", "questions": [vqa_question(90, 9), vqa_question(91, 9)]}
    # one vote each: the first given wins; two for blue: blue wins
    annotations = [vqa_annotation(91, ["red", "blue"]), vqa_annotation(90, ["red", "blue", " blue"])]
    lay_out(tmp_path, {"data/vqav2/v2_mscoco_train2014_annotations.json": {"annotations": annotations}})
    reader = published("vqav2", tmp_path, questions, {picture: (8, 6)})
    form = "{}\nAnswer the question using a single word or phrase."
    assert shown(reader) == ["<0>" + form.format("What is 90?"), "blue", form.format("What is 91?"), "red"]
    assert reader.read(0).meta == {"id": 90}
    assert (len(reader), reader.published) == (1, 2)


def test_a_question_without_its_annotation_is_a_bad_record_and_one_with_two_an_error(tmp_path: Path) -> None:
    name = "data/vqav2/v2_mscoco_train2014_annotations.json"
    source = {"questions": [vqa_question(90, 9)]}
    lay_out(tmp_path, {name: {"annotations": [vqa_annotation(7, ["red"])]}})
    reader = published("vqav2", tmp_path, source, {"x/000000000009.jpg": (8, 6)})
    with pytest.raises(SampleError, match="has nothing for question_id 90"):
        reader.read(0)
    lay_out(tmp_path, {name: {"annotations": [vqa_annotation(90, ["red"])] * 2}})
    with pytest.raises(DataError, match="'question_id' 90 comes twice"):
        published("vqav2", tmp_path, source)


def test_okvqa_takes_the_words_and_not_their_stems(tmp_path: Path) -> None:
    annotation = vqa_annotation(90, ["poni tail"])
    annotation["answers"][0]["raw_answer"] = "pony tail"
    lay_out(tmp_path, {"data/okvqa/mscoco_train2014_annotations.json": {"annotations": [annotation]}})
    pictures = {"COCO_train2014_000000000009.jpg": (8, 6)}
    assert shown(published("okvqa", tmp_path, {"questions": [vqa_question(90, 9)]}, pictures))[1] == "pony tail"


def test_textvqa_votes_on_plain_answers(tmp_path: Path) -> None:
    record = {"question_id": 34602, "question": "what is the brand?", "image_id": "0054c91397f2fe05", "image_width": 8,
              "answers": ["nous", "dakota", "dakota digital", "dakota", "dakota"]}  # fmt: skip
    reader = published(
        "textvqa", tmp_path, {"dataset_type": "train", "data": [record]}, {"0054c91397f2fe05.jpg": (8, 6)}
    )
    assert shown(reader)[1] == "dakota"


def test_coco_captions_find_their_pictures_in_the_same_file(tmp_path: Path) -> None:
    source = {
        "info": {"year": 2017},
        "images": [{"id": 25, "file_name": "000000000025.jpg", "width": 8, "height": 6}],
        "annotations": [
            {"id": number, "image_id": 25, "caption": f"Two giraffes standing in a tree filled area {number}. \n"}
            for number in range(40)
        ],
    }
    reader = published("coco_captions", tmp_path, source, {"000000000025.jpg": (8, 6)})
    turns = [shown(reader, number) for number in range(40)]
    assert [answer for _, answer in turns] == [f"Two giraffes standing in a tree filled area {n}." for n in range(40)]
    assert len({question for question, _ in turns}) == 4  # each wording comes
    assert turns[7] == shown(reader, 7)
    assert reader.read(3).meta == {"id": 3, "image_id": 25}


REFCOCO = {"img_id": "COCO_train2014_000000580957_4", "sents": "bowl behind the others",
           "bbox": [20.0, 10.0, 40.5, 20.0], "height": 40, "width": 80}  # fmt: skip


def test_refcoco_boxes_become_shares_of_the_picture_or_of_its_square(tmp_path: Path) -> None:
    pictures = {"COCO_train2014_000000580957.jpg": (80, 40)}
    reader = published("refcoco", tmp_path, [REFCOCO], pictures)
    question, answer = shown(reader)
    assert question.endswith("in fractions of the picture: bowl behind the others")
    # corners (20, 10) and (60.5, 30) of 80 x 40
    assert answer == "[0.250, 0.250, 0.756, 0.750]"
    assert reader.read(0).meta == {"img_id": REFCOCO["img_id"], "boxes": "xyxy01"}
    padded = published("refcoco", tmp_path, None, boxes_to="xyxy01_padded")
    # 20 pixels above: (20, 30) and (60.5, 50) of 80 x 80
    assert shown(padded)[1] == "[0.250, 0.375, 0.756, 0.625]"
    assert padded.read(0).meta["boxes"] == "xyxy01_padded"


def test_refcoco_names_of_another_form_are_bad_records(tmp_path: Path) -> None:
    reader = published("refcoco", tmp_path, [{**REFCOCO, "img_id": "580957"}], {"a.jpg": (8, 6)})
    with pytest.raises(SampleError, match="'img_id' is '580957', which is not of the form"):
        reader.read(0)


def multi(prompt: str, target: str, region: list[str] | None, path: str) -> dict:
    record = {"unique_id": "526754_592886", "image_source": "coco2014", "task_name": "t", "image_path": path,
              "target_txt": target, "prompt": prompt, "target": target}  # fmt: skip
    return record if region is None else {**record, "region": region}


def test_multiinstruct_boxes_options_and_paths(tmp_path: Path) -> None:
    path = "raw_datasets/MSCOCO2014/train2014/COCO_train2014_000000000009.jpg"
    box, other = "20.0 10.0 60.0 30.000000000000004", "0 0 80.5 40"
    records = [
        multi("Decide if the text in the given region is legible. Region 20.0 10.0 60.0 30.0 \n\n"
              "[Options]: not clear and complete||||clear", "clear", ["20.0 10.0 60.0 30.0"], path),
        multi(f"Given {box}||||{other}, select.\n\n[Options]: {other}||||{box}", box, [box], f"./{path}"),
        multi("Add 1 2 3 4 up.", "10", None,
              "/projects/nlp_lab/zhiyang/projects/datasets/pretrain/VQAv2/train2014/COCO_train2014_000000000009.jpg"),
        multi("Which is it? 500 10 600 30", "a cat", ["500 10 600 30"], path),
    ]  # fmt: skip
    reader = published("multiinstruct", tmp_path, records, {path: (80, 40)})
    assert shown(reader, 0) == [
        "<0>Decide if the text in the given region is legible. Region [0.250, 0.250, 0.750, 0.750]\n"
        "Options:\nnot clear and complete\nclear",
        "clear",
    ]
    whole, part = "[0.000, 0.000, 1.000, 1.000]", "[0.250, 0.250, 0.750, 0.750]"
    assert shown(reader, 1) == [f"<0>Given {part}, {whole}, select.\nOptions:\n{whole}\n{part}", part]
    assert reader.read(1).meta == {"id": "526754_592886", "task": "t", "boxes": "xyxy01"}
    assert shown(reader, 2) == ["<0>Add 1 2 3 4 up.", "10"]
    assert [reader.read(n).id for n in range(3)] == [f"multiinstruct/{n:08d}" for n in range(3)]
    with pytest.raises(SampleError, match="in a picture of 80"):
        reader.read(3)
    as_published = published("multiinstruct", tmp_path, None, options_as="published")
    assert shown(as_published, 0)[0].endswith("[Options]: not clear and complete||||clear")
