"""The doctor: what it finds in samples, between samples and sets, what it predicts, and what training does about it."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from data_factories import encode, llava_record, make_shards, measure, picture, talk, write_source
from model_factories import tiny_model_section
from msgspec import structs
from shard_server import serving
from test_shards import write_tar
from typer.testing import CliRunner

from mmit.cli_data import app
from mmit.conversation import Conversation, ImageRef, Message
from mmit.data import quarantine
from mmit.data.browse import browse
from mmit.data.check import Depth, check
from mmit.data.convert import Conversion, convert
from mmit.data.examine import COMMON, Control, content_key, examine
from mmit.data.faults import StorageError
from mmit.data.findings import Diagnosis, Prediction, Report, span
from mmit.data.lengths import LengthTable, fit, measure_lengths
from mmit.data.loader import Loader
from mmit.data.page import diagnosis_page
from mmit.data.plan import Plan, make_plan
from mmit.data.shard_set import ShardSet, open_source
from mmit.data.shards import ShardWriter
from mmit.data.stats import stats
from mmit.errors import ConfigError, DataError
from mmit.train.doctor import Questions, diagnose, save

QUIET = Depth(processes=1, progress=False)


def written(folder: Path, conversations: list[Conversation]) -> Path:
    folder.mkdir(parents=True)
    with ShardWriter(folder / "s.tar") as shard:
        for number, conversation in enumerate(conversations):
            shard.write(f"k{number}", conversation)
        shard.finish()
    return folder


def spoken(answer: str, question: str = "What?", colour: str = "red", *, images: int = 1) -> Conversation:
    return Conversation(
        id=f"x/{answer}",
        messages=talk(question, answer, images=images),
        images=(picture(colour=colour),) * images,
        sizes=((8, 6),) * images,
    )


def findings(report: Report) -> dict[str, tuple[str, int]]:
    return {kind: (severity, report.faults[kind]) for severity, kind in report.kinds()}


# ---------------------------------------------------------------------------------------- one sample


LONG = "word " * 20


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (LONG + "and then the", "note"),
        (LONG + "red, green,", "note"),
        (LONG + "the bus is red.", None),
        (LONG + 'he said "stop"', None),
        (LONG + "赤い。", None),
        ("A red bus", None),  # short answers have no full stop
    ],
)
def test_a_long_answer_that_ends_within_a_sentence_is_noted(answer: str, found: str | None) -> None:
    assert [severity for severity, _ in examine(spoken(answer), COMMON)] == ([found] if found else [])


def test_control_tokens_in_a_text_are_found_in_any_turn() -> None:
    sample = spoken("Red.</s>", "An <image> of [INST]?")
    assert [reason for _, reason in examine(sample, COMMON)] == [
        "turn 1 holds the control token '<image>'",
        "turn 1 holds the control token '[INST]'",
        "turn 2 holds the control token '</s>'",
    ]
    own = Control(frozenset({"<|im_end|>"}), "error")  # of a tokenizer to which the others are plain text
    assert list(examine(sample, own)) == []
    assert [severity for severity, _ in examine(spoken("Red.<|im_end|>"), own)] == ["error"]


def test_a_token_that_a_picture_cuts_in_two_is_none() -> None:
    message = Message(role="user", content=("<im", ImageRef(0), "age>"))
    sample = structs.replace(spoken("Red."), messages=(message, Message(role="assistant", content=("Red.",))))
    assert list(examine(sample, COMMON)) == []


def test_turns_out_of_order_are_warnings() -> None:
    turns = talk("a", "b")
    for messages, word in (((turns[1], *turns), "first turn is an answer"), ((*turns, turns[0]), "without an answer")):
        ((severity, reason),) = examine(Conversation(id="x", messages=messages), COMMON)
        assert severity == "warning"
        assert word in reason


def test_the_content_key_is_that_of_pictures_and_text_alone() -> None:
    one, other = spoken("Red."), structs.replace(spoken("Red."), id="y/2", meta={"a": 1}, source="y")
    assert content_key(one) == content_key(other)
    keys = {
        int(content_key(sample)[0])
        for sample in (
            one,
            spoken("Blue."),
            spoken("Red.", colour="blue"),
            spoken("Red.", images=0),
            spoken("R", "ed."),
        )
    }
    assert len(keys) == 5


# ---------------------------------------------------------------------------------------- sets


def test_samples_that_come_again_under_another_name_are_found(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", [spoken("Red."), spoken("Blue."), spoken("Red."), spoken("Red.")])
    report = check(folder, QUIET)
    assert findings(report) == {"has the pictures and the text of …": ("warning", 2)}
    assert report.places["has the pictures and the text of …"] == [
        "s.tar: k2: has the pictures and the text of 's.tar: k0'",
        "s.tar: k3: has the pictures and the text of 's.tar: k0'",
    ]
    assert report.exit_code == 3


def test_samples_of_the_other_set_are_errors_and_shared_pictures_warnings(tmp_path: Path) -> None:
    train = written(tmp_path / "train", [spoken("Red."), spoken("Is it red?"), spoken("No.", colour="blue")])
    test = written(tmp_path / "test", [structs.replace(spoken("Red."), id="other")])
    report = check(train, QUIET, against=[test])
    assert findings(report) == {
        "is in … too, with the same pictures and text": ("error", 1),
        "shares a picture with …": ("warning", 1),
    }
    assert report.places["shares a picture with …"] == ["s.tar: k1: shares a picture with 'test'"]
    assert [(entry.key, entry.row) for entry in report.broken] == [("k0", 0)]
    assert report.exit_code == 1


def test_the_worst_finding_decides_the_exit_code() -> None:
    report = Report()
    codes = [report.exit_code]
    for severity in ("note", "warning", "error"):
        report.add("x", f"a {severity}", severity)
        codes.append(report.exit_code)
    assert codes == [0, 0, 3, 1]
    assert [severity for severity, _ in report.kinds()] == ["error", "warning", "note"]
    assert Diagnosis([Report()], [Prediction(stage="s", problem="too long")]).exit_code == 1


def test_processes_find_the_same(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 24)
    alone, together = (check(shards.directory, replace(QUIET, processes=n)).to_json() for n in (1, 2))
    assert alone == together
    assert alone["samples"] == 24


def test_a_set_behind_a_url_is_checked_like_one_on_the_disk(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 12)
    with serving(shards.directory) as server:
        far = check(server.url, replace(QUIET, cache=tmp_path / "here"))
    assert far.to_json() == check(shards.directory, QUIET).to_json()


# ---------------------------------------------------------------------------------------- quarantine


def damaged(folder: Path) -> ShardSet:
    """Twelve samples, one picture of which breaks off: only decoding finds it."""
    from test_check_show import rewritten

    whole = picture(64, 64)
    records = [llava_record(n, words=n + 1) for n in range(12)]
    source = write_source(folder / "source", records)
    (folder / "source" / "a.jpg").write_bytes(whole)
    target = folder / "set"
    convert(Conversion(reader="llava_json", source=source, target=target, name="set"), processes=1, progress=False)
    tar = target / "shard-000000.tar"
    rewritten(tar, {"00000004.0.jpg": whole[: len(whole) // 2]})
    (target / "manifest.json").unlink()  # its checksum is another one now
    return open_source(target)


def listed(shards: ShardSet, depth: Depth = QUIET) -> ShardSet:
    """The set after the doctor has put its broken samples into quarantine."""
    report = check(shards.directory, depth)
    quarantine.write(shards.directory, report.broken)
    return open_source(shards.directory)


def table(shards: ShardSet) -> LengthTable:
    return measure_lengths(shards, measure, fingerprint="f", max_skipped=0, processes=1, progress=False)


def planned(shards: ShardSet) -> Plan:
    return make_plan(
        [(shards, len(shards))],
        [table(shards)],
        length=64,
        rows_per_step=2,
        packing=True,
        tiles_per_row=8,
        seed=0,
    )


def seen(plan: Plan) -> tuple[list[str], int]:
    loader = Loader(
        plan, encode, rank=0, world=1, rows_per_micro_batch=2, workers=0, pad_id=0, image_size=(2, 2), max_skipped=1
    )
    steps = list(loader)
    names = [name for step in steps for batch in step.batches for name in batch.sample_ids]
    return sorted(names), sum(len(step.skipped) for step in steps)


def test_training_leaves_out_what_the_doctor_lists(tmp_path: Path) -> None:
    shards = damaged(tmp_path)
    bad = next(n for n in range(12) if shards.place(n)[1] == "00000004")
    before, healed = planned(shards), listed(shards)
    assert healed.quarantined.tolist() == [bad]
    after = planned(healed)
    assert before.fingerprint != after.fingerprint
    assert [name for name in before.parts if before.parts[name] != after.parts[name]] == [
        "lengths (tokenizer, template, image tokens, too_long)",
        "quarantine",
    ]
    everyone = [f"set/{number:08d}" for number in range(12)]
    assert seen(before) == ([name for name in everyone if name != "set/00000004"], 1)
    assert seen(after) == ([name for name in everyone if name != "set/00000004"], 0)
    again = check(healed.directory, QUIET)
    assert (again.exit_code, again.quarantined, again.samples) == (0, 1, 12)
    assert "1 in quarantine" in again.headline()


def test_a_quarantined_sample_is_no_longer_a_broken_one(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", [spoken("poison <s>"), spoken("Red."), spoken("Blue.")])
    shards = open_source(folder)
    with pytest.raises(DataError, match="1 of 3 samples cannot be used"):
        table(shards)
    found = table(listed(shards, replace(QUIET, control=Control(frozenset({"<s>"}), "error"))))
    assert (found.tokens > 0).tolist() == [False, True, True]
    assert found.refused == ()


def test_too_long_samples_are_cut_anew_after_one_of_them_went_into_quarantine(tmp_path: Path) -> None:
    turns = (*talk("a b", "c d"), *talk("e f", "g h"))
    folder = written(tmp_path / "a", [Conversation(id=f"x/{n}", messages=turns) for n in range(3)])
    shards = open_source(folder)
    options = {"fingerprint": "f", "length": 6, "tiles_per_row": 1, "too_long": "drop_turns"}
    assert fit(table(shards), shards, measure, **options)[0].tokens.tolist() == [4, 4, 4]
    quarantine.write(folder, [shards.entry(1, "by hand")])
    healed = open_source(folder)
    assert fit(table(healed), healed, measure, **options)[0].tokens.tolist() == [4, 0, 4]


def test_a_list_for_other_shards_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", [spoken("Red."), spoken("Blue.")])
    path = quarantine.write(folder, [open_source(folder).entry(1, "bad\nin two lines")])
    (line,) = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert line.split("\t")[3:] == ["k1", "bad in two lines"]
    (folder / "s.tar").unlink()
    with ShardWriter(folder / "s.tar") as shard:
        shard.write("other", spoken("Green."))
        shard.finish()
    with pytest.raises(StorageError, match=r"'k1' does not stand at row 1 of s\.tar: the shards were made anew"):
        open_source(folder)
    path.write_text("s.tar\tk1\n")
    with pytest.raises(StorageError, match=r"quarantine\.txt, line 1: is not 'shard, row, checksum, key, reason'"):
        open_source(folder)


def test_the_list_grows_and_lines_can_be_taken_out(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", [spoken("Red."), spoken("Blue."), spoken("Green.")])
    shards = open_source(folder)
    quarantine.write(folder, [shards.entry(2, "x")])
    path = quarantine.write(folder, [shards.entry(0, "y")])
    assert open_source(folder).quarantined.tolist() == [0, 2]
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "\tk2\t" not in line))
    assert open_source(folder).quarantined.tolist() == [0]


# ---------------------------------------------------------------------------------------- pages, numbers, command line


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "onerror", "onclick")]


def test_a_page_shows_pictures_and_runs_nothing_from_the_data(tmp_path: Path) -> None:
    attack = '<script>alert(1)</script><img src="http://x/" onerror="y"> & "quoted"'
    folder = written(tmp_path / "a", [spoken(attack, attack), spoken("Blue.", images=0)])
    assert browse(folder, tmp_path / "page.html") == 2
    text = (tmp_path / "page.html").read_text()
    found = Tags(text)
    assert "script" not in found.tags
    assert found.tags.count("img") == 1
    assert all(source.startswith("data:image/jpeg;base64,") for source in found.sources)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "default-src 'none'" in text


def test_a_report_has_pictures_of_what_it_is_about(tmp_path: Path) -> None:
    folder = written(tmp_path / "a<b>", [spoken("Red."), spoken("Red."), spoken("<s>", colour="blue")])
    page = diagnosis_page("a<b>", Diagnosis([check(folder, QUIET)], [Prediction(stage="only", lengths={4: 3})]))
    assert Tags(page).tags.count("img") == 2
    assert "a&lt;b&gt;" in page
    assert "8-15" in page


def test_text_that_is_no_unicode_can_still_be_reported(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "half \ud800"}]
    write_tar(tmp_path / "a" / "s.tar", {"x.json": json.dumps({"messages": turns}).encode()})
    diagnosis = Diagnosis([check(tmp_path / "a", QUIET)])
    assert diagnosis.exit_code == 1
    assert list(save(diagnosis, "t", json=tmp_path / "r.json", html=tmp_path / "r.html", quarantined=True))
    assert json.loads((tmp_path / "r.json").read_text())["exit_code"] == 1


def test_stats_are_those_of_the_samples(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 12, lengths=range(1, 13))
    found = stats(shards.directory, processes=1, progress=False)
    assert found.samples == 12
    assert found.columns["words of answers"].tolist() == [
        len(shards.read(n).messages[1].text.split()) for n in range(12)
    ]
    assert found.percentiles()["words of answers"] == [1, 6, 11, 12]
    assert found.percentiles()["image width"] == [8, 8, 8, 8]
    assert int(found.columns["images"].sum()) == 8


@pytest.mark.parametrize(("bits", "label"), [(0, "0"), (1, "1"), (2, "2-3"), (3, "4-7"), (11, "1024-2047")])
def test_a_histogram_names_its_spans(bits: int, label: str) -> None:
    assert span(bits) == label
    assert all(number.bit_length() == bits for number in map(int, re.findall(r"\d+", label)))


def test_the_command_writes_reports_and_a_quarantine_and_tells_by_its_exit_code(tmp_path: Path) -> None:
    shards = damaged(tmp_path)
    words = ["check", str(shards.directory), "--processes", "1"]
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    done = CliRunner().invoke(app, [*words, *files, "--quarantine"])
    assert done.exit_code == 1, done.output
    assert "1 samples added" in done.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["exit_code"] == 1
    assert [finding["severity"] for finding in report["sets"][0]["findings"]] == ["error"]
    assert "image" in (tmp_path / "r.html").read_text()
    healed = CliRunner().invoke(app, words)
    assert (healed.exit_code, "no faults" in healed.output) == (0, True)
    assert CliRunner().invoke(app, [*words, "--no-decode"]).exit_code == 0
    assert CliRunner().invoke(app, ["stats", str(shards.directory), "--processes", "1"]).exit_code == 0
    page = tmp_path / "b.html"
    assert CliRunner().invoke(app, ["browse", str(shards.directory), "--out", str(page)]).exit_code == 0
    assert page.is_file()


def test_a_recipe_and_a_run_are_checked_by_what_they_read(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    texts = [spoken("Red."), spoken("Blue " * 40 + "x."), spoken("A </s>.")]
    written(folder, texts)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"name": "m", "reader": "messages", "source": "a.json", "shards": str(folder)}))
    questions = Questions(depth=QUIET, tokens_per_second=100.0)
    (report,) = diagnose(str(recipe), questions).reports
    assert findings(report) == {"turn … holds the control token …": ("warning", 1)}
    stage = {
        "train": {"connector": 1e-3},
        "data": {"mix": [{"shards": str(folder)}], "template": "vicuna", "max_skipped": 0.5, "too_long": "drop"},
        "batch": {"length": 64, "tokens_per_step": 128},
    }
    run = tmp_path / "run.yaml"
    parts = tiny_model_section(tmp_path / "parts")
    run.write_text(yaml.safe_dump({"name": "t", "output": str(tmp_path), "model": parts, "stages": {"only": stage}}))
    found = diagnose(str(run), questions)
    assert [finding[0] for finding in findings(found.reports[0]).values()] == ["error"]  # the tokenizer has </s>
    (prediction,) = found.predictions
    assert (prediction.problem, prediction.samples, prediction.dropped, prediction.refused) == ("", 1, 1, 1)
    assert sum(prediction.lengths.values()) == 2
    assert prediction.longest > 64
    assert (prediction.steps, prediction.rows) == (1, 1)
    assert prediction.hours == pytest.approx(prediction.tokens / 360_000)
    stage["data"]["too_long"] = "error"
    run.write_text(yaml.safe_dump({"name": "t", "output": str(tmp_path), "model": parts, "stages": {"only": stage}}))
    (prediction,) = diagnose(str(run), questions).predictions
    assert "longer than a row of 64 tokens" in prediction.problem


def test_what_cannot_be_checked_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such directory or tar"):
        diagnose(str(tmp_path / "nowhere"), Questions(depth=QUIET))
    with pytest.raises(
        ConfigError,
        match="nosuch: there is no directory, tar or run file of this name, and there is no recipe 'nosuch'",
    ):
        diagnose("nosuch", Questions(depth=QUIET))
    report = Report(url="https://x/", broken=[quarantine.Entry("s.tar", 0, 0, "k", "r")])
    with pytest.raises(DataError, match=r"quarantine\.txt belongs beside the manifest"):
        list(save(Diagnosis([report]), "t", json=None, html=None, quarantined=True))
    with pytest.raises(DataError, match="cannot be written"):
        list(save(Diagnosis([]), "t", json=tmp_path / "no" / "r.json", html=None, quarantined=False))
    assert np.array_equal(quarantine.numbers([], {}, where=""), np.zeros(0))
