"""The record of a stage survives a kill and is drawn."""

import json
import logging
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from mmit.train.curves import line_chart
from mmit.train.metrics import Recorder
from mmit.train.records import EvaluationRecord, StepRecord
from mmit.train.sinks import Sinks


def record(step: int, loss: float) -> StepRecord:
    return StepRecord(
        step=step,
        loss=loss,
        lr={"connector": 1e-3},
        grad_norm=1.0,
        tokens=100,
        trained_tokens=20,
        images=2,
        samples=4,
        skipped=0,
        skipped_in_all=0,
        samples_digest=7,
        seconds=0.5,
        wait_seconds=0.1,
    )


def recorder(folder: Path, resume_step: int = 0) -> Recorder:
    return Recorder(folder, steps=10, every_steps=1, resume_step=resume_step, sinks=Sinks({}))


def test_every_step_is_one_line(tmp_path: Path) -> None:
    log = recorder(tmp_path)
    for step in (1, 2, 3):
        log.add(record(step, 3.0 / step))
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 3.0), (2, 1.5), (3, 1.0)]


def test_a_step_that_overflowed_in_fp16_is_told_and_other_precisions_have_no_loss_scale(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = recorder(tmp_path)
    log.add(record(1, 3.0))
    with caplog.at_level(logging.INFO, "mmit"):
        log.add(replace(record(2, 3.0), grad_norm=None, loss_scale=32768.0, left_out_in_all=1))
    log.close()
    plain, overflowed = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert plain.keys() == overflowed.keys() - {"loss_scale", "left_out_in_all"}
    assert (overflowed["grad_norm"], overflowed["loss_scale"], overflowed["left_out_in_all"]) == (None, 32768.0, 1)
    assert "grad overflow" in caplog.text
    assert "loss scale 32768, steps left out 1" in caplog.text


def test_steps_done_after_the_last_checkpoint_are_not_told_twice(tmp_path: Path) -> None:
    log = recorder(tmp_path)
    for step in (1, 2, 3, 4):
        log.add(record(step, 1.0))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # what a kill leaves
    again = recorder(tmp_path, resume_step=2)
    again.add(record(3, 0.5))
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 0.5)]


def evaluation(step: int) -> EvaluationRecord:
    return EvaluationRecord(
        step=step,
        loss=2.0,
        loss_by_source={"a": 2.0},
        visual_gain={"blank": 0.5},
        visual_gain_by_source={"a": {"blank": 0.5}},
        trained_tokens=9,
        samples=3,
        seconds=0.1,
    )


def test_a_held_out_loss_stands_beside_the_training_loss_of_the_steps_since_the_one_before(tmp_path: Path) -> None:
    log = recorder(tmp_path)
    for step, loss in ((1, 6.0), (2, 4.0), (3, 3.0), (4, 1.0)):
        log.add(record(step, loss))
        if step % 2 == 0:
            log.add_evaluation(evaluation(step))
    log.close()
    again = recorder(tmp_path, resume_step=3)
    again.add(record(4, 2.0))
    again.add_evaluation(evaluation(4))
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert [(line["step"], line["training_loss"]) for line in lines] == [(2, 5.0), (4, 2.5)]
    assert lines[0]["visual_gain_by_source"] == {"a": {"blank": 0.5}}


def test_the_curve_is_svg_with_a_point_per_step(tmp_path: Path) -> None:
    log = recorder(tmp_path)
    for step in range(1, 8):
        log.add(record(step, 8.0 - step))
    log.close()
    root = ET.fromstring((tmp_path / "loss.svg").read_text())
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [7, 7]


def test_a_falling_loss_is_drawn_from_top_left_to_bottom_right() -> None:
    points = (
        ET.fromstring(line_chart({"loss": [(1, 4.0), (2, 1.0)]}, title="loss"))
        .findall("{http://www.w3.org/2000/svg}polyline")[0]
        .attrib["points"]
    )
    (x0, y0), (x1, y1) = [tuple(map(float, pair.split(","))) for pair in points.split()]
    assert x0 < x1
    assert y0 < y1  # SVG's y grows downwards
