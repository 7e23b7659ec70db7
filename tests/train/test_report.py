"""The page about a run stands alone and says what was done; two runs are told apart by what differed."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_factories import make_shards
from PIL import Image
from typer.testing import CliRunner

from mmit.cli import app
from mmit.config_file import parse, resolved_yaml
from mmit.errors import ConfigError
from mmit.train.curves import line_chart, thinned
from mmit.train.difference import differences
from mmit.train.report import write_report

EVIL = "<script>alert(1)</script>"


def picture_bytes() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(file, "JPEG")
    return file.getvalue()


def write_stage(run: Path, name: str = "one", *, losses: tuple[float, ...] = (4.0, 2.0), **changes: Any) -> Path:
    """A stage's folder as a run leaves it. changes: of the stage's section."""
    section = {
        "train": {"connector": 1e-3},
        "data": {"mix": [{"shards": str(run.parent / "shards")}]},
        "batch": {"length": 8, "tokens_per_step": 16},
    }
    content = {"name": "tiny", "output": str(run), "model": {"path": "some/model"}, "stages": {name: section | changes}}
    folder = run / name
    folder.mkdir(parents=True)
    config = parse(yaml.safe_dump(content), source="run.yaml", overrides=[])
    (folder / "config.yaml").write_text(resolved_yaml(config))
    source = {"name": EVIL, "size": 9, "samples": 9, "tokens": 90, "trained_tokens": 30, "tiles": 6, "left_out": 2}
    facts = {"stage": name, "plan": "abc", "versions": {"torch": "2.9"}, "git": "1a2b3c", "ranks": 2}
    (folder / "stage.json").write_text(json.dumps(facts | {"data": {"steps": 2, "sources": [source]}}))
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": loss, "lr": {"connector": 1e-3}, "grad_norm": 1.0, "tokens": 100, "trained_tokens": 20}
        | {"seconds": 0.5, "wait_seconds": 0.1, "skipped": 0, "memory_bytes": 2**30, "loss_by_source": {EVIL: loss}}
        for step, loss in enumerate(losses, start=1)
    ]
    lines[0] |= {"update_ratio": {"connector": 0.0125}, "mfu": 0.5}
    lines[-1] |= {"spike": "skip", "mfu": 0.25}
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 3, "lo')
    held_out = {"step": 2, "loss": 2.5, "loss_by_source": {EVIL: 2.5}, "visual_gain": {"blank": 0.5}}
    held_out["visual_gain_by_source"] = {EVIL: {"blank": 0.5}}
    (folder / "evaluation.jsonl").write_text(json.dumps(held_out) + "\n")
    device = {
        "device": "cpu",
        "peak_flops": 5e12,
        "held": {"parameters": {"connector": 2**28, "language_model": 2**29}},
    }
    (folder / "device.json").write_text(json.dumps(device))
    (folder / "answers").mkdir()
    (folder / "answers" / "a.jpg").write_bytes(picture_bytes())
    said = {"id": EVIL, "source": "held", "pictures": ["answers/a.jpg", "../../../etc/hostname"], "question": EVIL}
    said |= {"reference": "a red square"}
    answers = [said | {"step": step, "answer": f"answer {step}"} for step in (1, 2)]
    (folder / "answers.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in answers))
    bad = {"step": 1, "source": EVIL, "id": EVIL, "reason": EVIL}
    (folder / "skipped-rank0.jsonl").write_text(json.dumps(bad) + "\n")
    checkpoint = folder / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").write_text("all")
    return folder


def test_the_page_asks_for_nothing_outside_and_shows_names_as_text(tmp_path: Path) -> None:
    make_shards(tmp_path, 3, name="shards")
    write_stage(tmp_path / "run")
    page = write_report(tmp_path / "run", tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    outside = page.replace("http://www.w3.org/2000/svg", "")  # the name of a format, which nothing fetches
    assert [word for word in ("http:", "https:", "<link", "@import", "url(") if word in outside] == []
    for fact in ("2 steps of 2 done", "1a2b3c", "abc", "step-000002", "data:image/jpeg;base64,", "connector: 0.001"):
        assert fact in page
    # 2 x 100 tokens in 2 x 0.5 s; a fifth of it waiting; the losses 4 and 2; 2**30 bytes
    for value in ("<td>200</td>", "<td>0.2</td>", "<td>final loss</td><td>3</td>", "GiB</td><td>1</td>"):
        assert value in page


def test_the_page_shows_what_looked_on(tmp_path: Path) -> None:
    write_stage(tmp_path / "run")
    page = write_report(tmp_path / "run", tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 1  # the picture of the question; a path that leads away shows none
    for fact in ("<b>reference:</b> a red square", "<b>step 1:</b> answer 1", "<b>step 2:</b> answer 2"):
        assert fact in page
    # 2**28 and 2**29 of 2**30 bytes; the rest of the peak is a quarter
    assert "<td>parameters</td><td>0.250</td><td>0.500</td><td>0.750</td>" in page
    assert "libraries</td><td></td><td></td><td>0.250</td>" in page
    assert "Spikes of the loss (1)" in page
    assert "<td>2</td><td>2</td><td>update left out</td>" in page
    assert "<td>last update over weights: connector</td><td>0.0125</td>" in page
    assert "<td>MFU</td><td>0.375</td>" in page  # both steps took half a second
    assert "all devices</td><td>5</td>" in page


def test_two_runs_differ_in_the_setting_that_was_changed_and_in_what_came_of_it(tmp_path: Path) -> None:
    make_shards(tmp_path, 3, name="shards")
    write_stage(tmp_path / "a")
    folder = write_stage(tmp_path / "b", losses=(4.0, 1.0), optim={"weight_decay": 0.1})
    answers = folder / "answers.jsonl"
    answers.write_text(answers.read_text().replace("answer 2", "a circle"))
    found = {(one.kind, one.name): (one.first, one.second) for one in differences(tmp_path / "a", tmp_path / "b")}
    assert found == {
        ("settings", "stage.optim.weight_decay"): (0.0, 0.1),
        ("results", "final loss"): (3.0, 2.5),
        ("answers", EVIL): ("answer 2", "a circle"),
    }
    assert differences(tmp_path / "a", tmp_path / "a" / "one") == []
    told = CliRunner().invoke(app, ["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"])
    assert [one["name"] for one in json.loads(told.output)] == ["stage.optim.weight_decay", "final loss", EVIL]


def test_a_model_is_compared_by_what_it_says_it_was_made_from(tmp_path: Path) -> None:
    folder = write_stage(tmp_path / "a")
    facts = json.loads((folder / "stage.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    made_from = {"stage": "one", "plan": "other", "config": config, "versions": {"torch": "2.8"}, "git": facts["git"]}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mmit.json").write_text(json.dumps({"made_from": made_from}))
    found = {one.name: (one.first, one.second) for one in differences(folder, tmp_path / "model")}
    assert found["torch"] == ("2.9", "2.8")
    assert found["plan"] == ("abc", "other")
    assert "final loss" not in found  # of which a model directory says nothing


def test_a_stage_that_only_one_run_has_is_named(tmp_path: Path) -> None:
    write_stage(tmp_path / "a")
    write_stage(tmp_path / "b")
    write_stage(tmp_path / "b", "two")
    found = differences(tmp_path / "a", tmp_path / "b")
    assert [(one.stage, one.first, one.second) for one in found] == [("two", "not there", "there")]


def test_a_folder_that_is_no_run_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run of mmit.*give the 'output' of a run file"):
        write_report(tmp_path, tmp_path / "page.html")
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be read"):
        write_report(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_thinned_curve_keeps_its_mean_and_its_end() -> None:
    points = [(step, float(step)) for step in range(1, 1201)]
    thin = thinned(points, most=600)
    assert (thin[0], thin[-1], len(thin)) == ((2, 1.5), (1200, 1199.5), 600)


def test_a_chart_of_several_lines_names_each() -> None:
    chart = line_chart({"training": [(1, 2.0)], "a<b": [(1, 3.0), (2, float("nan"))]}, title="loss")
    assert "training</text>" in chart
    assert "a&lt;b</text>" in chart
    assert "nan" not in chart
