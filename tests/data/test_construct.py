"""Annotations and pools of wordings give conversations whose answers can be checked by hand."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_factories import picture

from mmit.conversation import ImageRef
from mmit.data.construct.annotation import read_annotation
from mmit.data.construct.instruct import instruct, tasks_for
from mmit.data.construct.pools import FOLDER, Pool, load_pool
from mmit.data.construct.source import Construction, construct
from mmit.data.construct.tasks import KINDS
from mmit.data.faults import SampleError
from mmit.data.shard_set import open_source
from mmit.errors import ConfigError, DataError

DOGS: dict[str, Any] = {
    "id": "r1",
    "image": "a.jpg",
    "width": 100,
    "height": 50,
    "captions": ["Two dogs and a ball."],
    "description": "A ball lies between two dogs. The brown dog looks at the Ball.",
    "boxes": [
        {"label": "dog", "box": [50, 10, 90, 40], "phrase": "the brown dog", "colour": "brown"},
        {"label": "dog", "box": [5, 10, 30, 40]},
        {"label": "ball", "box": [40, 30, 50, 40], "color": "red"},
    ],
    "absent": ["cat", "horse"],
}


def pool(tmp_path: Path, kind: str, *wordings: Any, **more: Any) -> Pool:
    path = tmp_path / "pool.yaml"
    tasks = {"task": {"kind": kind, "wordings": list(wordings)}}
    path.write_text(yaml.safe_dump({"name": "p", "boxes": "xyxy_px", "tasks": tasks, **more}))
    return load_pool(path)


def turns(record: dict[str, Any], given: Pool, *, seed: int = 0) -> list[tuple[str, str]]:
    found = instruct(read_annotation(record), given, seed=seed)
    texts = [message.text for message in found.messages]
    return list(zip(texts[::2], texts[1::2], strict=True))


@pytest.mark.parametrize(
    ("kind", "wording", "expected"),
    [
        ("caption", "Say it.", {("Say it.", "Two dogs and a ball.")}),
        ("description", "Tell.", {("Tell.", DOGS["description"])}),
        ("count", "{label}?", {("dog?", "2"), ("ball?", "1")}),
        # two dogs have no colour of their own but the one with a phrase
        ("colour", "{label}?", {("the brown dog?", "brown"), ("ball?", "red")}),
        ("locate", "{phrase}: {box_form}", {
            ("the brown dog: [left, top, right, bottom] in pixels", "[50, 10, 90, 40]"),
            ("ball: [left, top, right, bottom] in pixels", "[40, 30, 50, 40]"),
        }),
        ("describe_region", "{box}", {("[50, 10, 90, 40]", "the brown dog")}),
        ("name_region", "{box}", {
            ("[50, 10, 90, 40]", "dog"), ("[5, 10, 30, 40]", "dog"), ("[40, 30, 50, 40]", "ball"),
        }),
        ("detect", "{label}", {("dog", "[5, 10, 30, 40]\n[50, 10, 90, 40]"), ("ball", "[40, 30, 50, 40]")}),
        ("grounded", "Where?", {(
            "Where?",
            "A ball [40, 30, 50, 40] lies between two dogs. The brown dog [50, 10, 90, 40] looks at the Ball.",
        )}),
    ],
)  # fmt: skip
def test_each_kind_asks_what_the_annotation_answers(
    tmp_path: Path, kind: str, wording: str, expected: set[tuple[str, str]]
) -> None:
    assert set(turns(DOGS, pool(tmp_path, kind, wording))) == expected


def test_text_classes_and_questions_are_asked_too(tmp_path: Path) -> None:
    record = {
        **DOGS,
        "class": "park",
        "text": "NO DOGS\nALLOWED",
        "qa": [{"question": "How many?", "answers": ["two", "2", "2", 3]}, {"question": "Alone?", "answer": "no"}],
        "boxes": [{"box": [0, 0, 50, 25], "text": "NO"}, {"box": [0, 25, 50, 50], "text": "DOGS"}],
    }
    assert turns(record, pool(tmp_path, "classify", "Class?")) == [("Class?", "park")]
    assert turns(record, pool(tmp_path, "read_text", "Read.")) == [("Read.", "NO DOGS\nALLOWED")]
    assert turns(record, pool(tmp_path, "answer", "{question}")) == [("How many?", "2"), ("Alone?", "no")]
    assert turns(record, pool(tmp_path, "read_region", "{box}")) == [
        ("[0, 0, 50, 25]", "NO"),
        ("[0, 25, 50, 50]", "DOGS"),
    ]
    assert turns(record, pool(tmp_path, "locate_text", "{text}"))[1] == ("DOGS", "[0, 25, 50, 50]")


def test_presence_asks_for_as_many_that_are_there_as_are_not(tmp_path: Path) -> None:
    asked = turns(DOGS, pool(tmp_path, "presence", "Any {label}?"))
    assert set(asked) == {
        ("Any dog?", "Yes"), ("Any ball?", "Yes"), ("Any cat?", "No"), ("Any horse?", "No"),
    }  # fmt: skip
    one = pool(tmp_path, "presence", "Any {label}?", labels=["dog", "ball", "sofa"])
    assert Counter(answer for _, answer in turns({**DOGS, "absent": []}, one)) == {"Yes": 1, "No": 1}
    assert ("Any sofa?", "No") in turns({**DOGS, "absent": []}, one)


def test_choices_are_shuffled_and_the_letter_follows_the_right_one(tmp_path: Path) -> None:
    given = pool(tmp_path, "choice", {"ask": "{question}\n{options}", "say": "{letter}. {choice}"})
    letters: Counter[str] = Counter()
    for number in range(200):
        record = {"id": f"q{number}", "image": "a.jpg", "question": "?", "choices": ["w", "x", "y", "z"], "answer": "y"}
        ((question, answer),) = turns(record, given)
        assert answer in question.split("\n")
        assert answer[3:] == "y"
        letters[answer[0]] += 1
    # 200 draws of 4: 50 each, standard deviation 6
    assert set(letters) == set("ABCD")
    assert min(letters.values()) > 25


@pytest.mark.parametrize(
    ("answer", "right"), [("Y", "y"), ("C", "y"), ("(c)", "y"), ("B:", "x"), ("E", None), ("q", None)]
)
def test_an_answer_is_a_choice_or_its_letter(tmp_path: Path, answer: str, right: str | None) -> None:
    given = pool(tmp_path, "choice", {"ask": "{question} {options}", "say": "{choice}"})
    record = {"id": "1", "image": "a.jpg", "question": "?", "choices": ["w", "x", "y", "z"], "answer": answer}
    if right is None:
        with pytest.raises(SampleError, match=rf"'{answer}' is none of \['w', 'x', 'y', 'z'\]"):
            turns(record, given)
    else:
        assert turns(record, given)[0][1] == right


def test_the_wording_depends_on_the_seed_and_the_id_alone(tmp_path: Path) -> None:
    given = pool(tmp_path, "caption", "One.", "Two.", "Three.", "Four.")
    asked = {}
    for number in range(200):
        record = {"id": f"r{number}", "image": f"{number}.jpg", "caption": "It."}
        found = instruct(read_annotation(record), given, seed=0)
        assert given.tasks["task"].wordings[found.meta["wording"]].ask == found.messages[0].text
        asked[number] = found.meta["wording"]
        other = read_annotation({**record, "image": "other.jpg", "captions": ["More."], "licence": "x"})
        assert instruct(other, given, seed=0).meta["wording"] == asked[number]
    assert min(Counter(asked.values()).values()) > 25  # 200 draws of 4
    again = [instruct(read_annotation({"id": f"r{n}", "image": "a", "caption": "I."}), given, seed=1) for n in asked]
    assert [found.meta["wording"] for found in again] != list(asked.values())


def test_one_conversation_has_one_picture_one_task_and_its_numbers_in_the_meta(tmp_path: Path) -> None:
    given = pool(tmp_path, "count", "{label}?", "How many: {label}?", max_turns=1)
    found = instruct(read_annotation({**DOGS, "split": "train", "nested": {"a": 1}}), given, seed=3)
    assert found.images == ("a.jpg",)
    assert len(found.messages) == 2
    assert found.messages[0].content[0] == ImageRef(0)
    assert found.meta == {
        "split": "train", "id": "r1", "task": "task", "wording": found.meta["wording"], "pool": "p",
    }  # fmt: skip
    boxed = instruct(read_annotation(DOGS), pool(tmp_path, "detect", "{label}"), seed=3)
    assert boxed.meta["boxes"] == "xyxy_px"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": ""}, "names no image"),
        ({"width": 0, "height": 0}, "need the size of the picture"),
        ({"boxes": [{"label": "dog", "box": [0, 0, 300, 10]}]}, "another size of the picture"),
        ({"boxes": [{"label": "dog", "box": [0, 0, 3]}]}, "not a list of four numbers"),
        ({"boxes": [{"label": "<image>", "box": [0, 0, 9, 9]}]}, "holds <image>"),
        ({"boxes": []}, "has not what the task task of the pool p needs"),
        ({"boxes_are": "yxyx"}, "boxes_are is 'yxyx'; known are xyxy_px"),
    ],
)
def test_an_annotation_that_cannot_be_asked_is_a_bad_record(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    given = pool(tmp_path, "detect", "{label}")
    with pytest.raises(SampleError, match=reason):
        instruct(read_annotation({**DOGS, **change}), given, seed=0, task="task")


def test_a_crowd_is_neither_counted_nor_detected(tmp_path: Path) -> None:
    record = {**DOGS, "boxes": [*DOGS["boxes"], {"label": "dog", "box": [0, 0, 100, 9], "crowd": True}]}
    assert turns(record, pool(tmp_path, "count", "{label}")) == [("ball", "1")]
    assert turns(record, pool(tmp_path, "detect", "{label}")) == [("ball", "[40, 30, 50, 40]")]


@pytest.mark.parametrize(
    ("kind", "wording", "message"),
    [
        ("count", "How many {labels}?", r"tasks\.task\.wordings\[0\]: 'labels' is none of count, label"),
        ("count", "How many?", r"the question lacks \{label\}"),
        ("count", {"ask": "{label}?", "say": "Some {label}."}, "the answer says nothing new"),
        ("caption", "Is it {caption}?", r"gives the answer away: \{caption\}"),
        ("caption", "A {brace", "a brace that is meant is written twice"),
        ("counting", "{label}?", "there is no 'counting'; did you mean 'count'"),
        ("caption", {"asks": "What?"}, "tasks.task.wordings"),
    ],
)
def test_a_pool_is_checked_before_anything_is_written(tmp_path: Path, kind: str, wording: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        pool(tmp_path, kind, wording)
    assert str(caught.value).startswith(str(tmp_path / "pool.yaml"))


def test_a_wording_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="repeats wording 0"):
        pool(tmp_path, "caption", "Say it.", "Say it. ")


def test_the_pools_of_mmit_are_whole() -> None:
    general = load_pool("general")
    assert {task.kind.say for task in general.tasks.values()} >= {kind.say for kind in KINDS.values()}
    assert min(len(task.wordings) for task in general.tasks.values()) >= 4
    coco = load_pool("coco_objects")
    assert len(coco.labels) == len(set(coco.labels)) == 80
    with pytest.raises(ConfigError, match="did you mean 'general'"):
        load_pool("generel")
    with pytest.raises(ConfigError, match="has no task 'count'; did you mean 'counting'"):
        general.only(("count",))
    assert Path(FOLDER).name == "pools"


def write_annotations(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "a.jpg").write_bytes(picture(100, 50))
    path = folder / "annotations.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_an_annotated_source_becomes_shards_with_a_record_for_each_task(tmp_path: Path) -> None:
    records = [
        DOGS,
        {"image": "a.jpg", "caption": "Grass."},
        {"id": "r3", "image": "gone.jpg", "caption": "No."},
        {"id": "r4", "image": "a.jpg"},
    ]
    source = write_annotations(tmp_path / "in", records)
    construction = Construction(annotations=source, target=tmp_path / "out", pool="general", max_bad=0.5)
    manifest = construct(construction, processes=1, progress=False)
    shards = open_source(tmp_path / "out", cache=tmp_path / "cache")
    found = [shards.read(n) for n in range(len(shards))]
    pool = load_pool("general")
    assert sorted(c.meta["task"] for c in found if c.meta["id"] == "r1") == sorted(
        tasks_for(read_annotation(DOGS), pool, seed=0)
    )
    assert [c.messages[1].text for c in found if c.meta["id"] == "1"] == ["Grass."]  # its place is its id
    assert [(bad["id"], bad["reason"]) for bad in manifest.bad] == [
        ("r3", f"image 'gone.jpg' is not below {(tmp_path / 'in').resolve()}")
    ]
    assert manifest.skipped == {"no task of the pool general fits what is annotated": 1}
    # 100 x 50 is padded by 25 rows: (30 + 25) / 100 and (40 + 25) / 100
    (locate,) = [c for c in found if c.meta["task"] == "detection"]
    assert "[0.400, 0.550, 0.500, 0.650]" in [message.text for message in locate.messages]
    assert locate.meta["boxes"] == "xyxy01_padded"
    again = Construction(annotations=source, target=tmp_path / "again" / "out", pool="general", max_bad=0.5)
    assert construct(again, processes=1, progress=False).shards == manifest.shards  # byte for byte: SHA-256


def test_one_task_each_and_chosen_tasks_make_fewer_records(tmp_path: Path) -> None:
    source = write_annotations(tmp_path / "in", [{**DOGS, "id": f"r{n}"} for n in range(30)])
    one = Construction(annotations=source, target=tmp_path / "one", pool="general", one_task=True)
    assert construct(one, processes=1, progress=False).totals["samples"] == 30
    shards = open_source(tmp_path / "one", cache=tmp_path / "cache")
    assert len({shards.read(n).meta["task"] for n in range(30)}) > 4
    shutil.rmtree(tmp_path / "one")
    some = Construction(annotations=source, target=tmp_path / "some", pool="general", tasks=("counting", "colour"))
    assert construct(some, processes=1, progress=False).totals["samples"] == 60


def test_a_size_that_is_not_the_pictures_is_a_bad_record(tmp_path: Path) -> None:
    source = write_annotations(tmp_path / "in", [{**DOGS, "width": 200, "height": 100}])
    construction = Construction(annotations=source, target=tmp_path / "out", pool="general", tasks=("counting",))
    with pytest.raises(DataError, match="states 200 x 100 and the picture is 100 x 50 as displayed"):
        construct(construction, processes=1, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "message"), [("[]", "no annotations in it"), (None, "no such file")])
def test_a_source_without_annotations_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "annotations.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=rf"annotations\.json: .*{message}"):
        construct(Construction(annotations=path, target=tmp_path / "out", pool="general"), progress=False)


def test_the_example_in_the_docs_fits_these_tasks() -> None:
    text = (Path(__file__).parents[2] / "docs" / "instruction_data.md").read_text(encoding="utf-8")
    record = json.loads(text.partition("```json\n")[2].partition("```")[0])
    assert tasks_for(read_annotation(record), load_pool("general"), seed=0) == [
        "caption_short", "caption_detailed", "question_short", "choice_letter", "choice_text", "existence", "counting",
        "colour", "refer_to_box", "box_to_phrase", "box_to_label", "detection", "grounded_description",
    ]  # fmt: skip
