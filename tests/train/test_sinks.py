"""Where the record also goes: packages that are missing are named before training, those that fail are left out."""

import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mmit.config import Log
from mmit.errors import MissingExtra
from mmit.train.records import AnswerRecord
from mmit.train.sinks import check_sinks, open_sinks

ANSWER = AnswerRecord(
    step=2, id="a", source="s", pictures=("a.jpg",), question="What?", reference="a cat", answer="a dog"
)


class Recording:
    """A package as the sinks see it: what was asked of it is kept, and nothing is sent."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.broken = False

    def init(self, **words: Any) -> Any:
        self.asked.append(("init", words))
        return SimpleNamespace(log=self.log, define_metric=lambda *_, **__: None, finish=self.finish)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if self.broken:
            raise ConnectionError("the network is down")
        self.asked.append(("log", values if step is None else {**values, "step": step}))

    def finish(self) -> None:
        self.asked.append(("finish", None))

    def Image(self, path: str, caption: str) -> tuple[str, str]:
        return Path(path).name, caption


@pytest.fixture(params=["wandb", "trackio"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Recording]:
    """In place of a package that need not be installed; the real ones were run once by hand."""
    recording, module = Recording(), ModuleType(request.param)
    for name in ("init", "log", "finish", "Image"):
        setattr(module, name, getattr(recording, name))
    monkeypatch.setitem(sys.modules, request.param, module)
    return request.param, recording


def opened(folder: Path, name: str) -> Any:
    log = Log.model_validate({name: {"project": "mine"}})
    return open_sinks(log, folder, title="run-stage", config={"seed": 0}, resume_step=0)


def test_numbers_and_answers_arrive_and_a_run_that_goes_on_is_the_same_one(
    tmp_path: Path, package: tuple[str, Recording]
) -> None:
    name, recording = package
    for _ in range(2):
        sinks = opened(tmp_path, name)
        sinks.write({"loss": 2.0}, 1)
        sinks.show([ANSWER], tmp_path)
        sinks.close()
    first, second = [words for what, words in recording.asked if what == "init"]
    assert first == second  # the name or id too
    assert (first["project"], first["resume"], first["config"]) == ("mine", "allow", {"seed": 0})
    logged = [words for what, words in recording.asked if what == "log"]
    assert logged[0] == {"loss": 2.0, "step": 1}
    assert "a.jpg" in str(logged[1])
    assert "a dog" in str(logged[1])
    (tmp_path / "other").mkdir()
    opened(tmp_path / "other", name)
    assert recording.asked[-1][1] != first  # another folder is another run


def test_a_sink_that_fails_is_told_once_and_left_out(
    tmp_path: Path, package: tuple[str, Recording], caplog: pytest.LogCaptureFixture
) -> None:
    name, recording = package
    sinks = opened(tmp_path, name)
    recording.broken = True
    with caplog.at_level(logging.WARNING, logger="mmit"):
        sinks.write({"loss": 2.0}, 1)
        sinks.write({"loss": 2.0}, 2)
        sinks.close()
    assert caplog.messages == [f"log.{name}: the network is down; training goes on without it"]


@pytest.mark.parametrize(
    ("log", "extra"),
    [
        ({"tensorboard": True}, "track"),
        ({"wandb": {"project": "p"}}, "wandb"),
        ({"trackio": {"project": "p"}}, "trackio"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, log: dict[str, Any], extra: str
) -> None:
    monkeypatch.setattr("mmit.train.sinks.find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=rf"pip install 'mmit\[{extra}\]'"):
        check_sinks(Log.model_validate(log))


def test_tensorboard_gets_numbers_texts_and_pictures(tmp_path: Path) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg")
    sinks = open_sinks(Log(tensorboard=True), tmp_path, title="t", config={}, resume_step=0)
    sinks.write({"loss": 2.0, "update_ratio/connector": 0.5}, 1)
    sinks.show([ANSWER], tmp_path)
    sinks.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    tags = found.Tags()
    assert set(tags["scalars"]) == {"loss", "update_ratio/connector"}
    assert tags["images"] == ["answers/a"]
    assert found.Scalars("loss")[0].value == 2.0
