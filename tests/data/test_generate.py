"""A generation asks each question once, keeps what was answered through any death, and ends in shards."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
import yaml
from data_factories import picture
from llm_server import TALK, Answer, LlmServer, said
from model_factories import tiny_model_section

from mmit.chat.server import create_app
from mmit.config import ComposedModel
from mmit.conversation import ImageRef
from mmit.data.convert import Conversion, convert
from mmit.data.generate import run as run_module
from mmit.data.generate.journal import Journal
from mmit.data.generate.records import Outcome
from mmit.data.generate.run import generate
from mmit.data.generate.settings import Generation, load_generation
from mmit.data.shard_set import open_source
from mmit.errors import ConfigError, DataError, Interrupted
from mmit.images import read_size
from mmit.models.build import build_model

PROSE = "A dog lies on the grass in front of a red house. Behind it, two children play with a ball."
WHY = "Q: Why is the dog there?\nA: It waits for the children to come back with the ball."


def written(body: dict[str, Any]) -> str:
    """A good answer to whatever was asked for."""
    system = body["messages"][0]["content"]
    return TALK if "Invent a conversation" in system else WHY if "takes thought" in system else PROSE


def good(body: dict[str, Any], number: int) -> Answer:
    return said(written(body))


def annotations(folder: Path, count: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jpg").write_bytes(picture(100, 50))
    records = [
        {"id": f"r{n}", "image": "a.jpg", "captions": [f"Dog number {n}."], "boxes": [
            {"label": "dog", "box": [10, 10, 50, 30]}], "split": "train"}
        for n in range(count)
    ]  # fmt: skip
    path = folder / "annotations.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def settings(folder: Path, server: LlmServer | str, *, count: int = 3, **more: Any) -> Generation:
    endpoint = {
        "base_url": server if isinstance(server, str) else server.url,
        "model": "m",
        "first_wait": 0.01,
        "timeout": 5.0,
        "tries": 3,
        "concurrency": 2,
        **more.pop("endpoint", {}),
    }
    given = {"endpoint": endpoint, "source": annotations(folder, count), "out": folder / "out", **more}
    return Generation.model_validate(given)


def run(generation: Generation) -> Outcome:
    return generate(generation, progress=False)


def records(generation: Generation) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (generation.out / "records.jsonl").read_text().splitlines()]


def journal(generation: Generation) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (generation.out / "journal.jsonl").read_text().splitlines()]


def test_three_kinds_from_words_end_in_shards(tmp_path: Path) -> None:
    with LlmServer(lambda body, n: replace(good(body, n), delay=0.05)) as server:
        generation = settings(tmp_path, server)
        outcome = run(generation)
    assert (outcome.done, outcome.rejected, outcome.failed, outcome.left) == (9, 0, 0, 0)
    assert (outcome.usage.prompt_tokens, outcome.usage.completion_tokens) == (900, 180)
    assert server.busiest == 2
    last = next(t for body in server.requests if "- Dog number 2." in (t := body["messages"][-1]["content"]))
    assert "- dog: [0.100, 0.200, 0.500, 0.600]" in last  # 10 / 100, 10 / 50, 50 / 100, 30 / 50
    found = records(generation)
    assert [(r["id"], r["task"]) for r in found] == [
        (f"r{n}", kind) for n in range(3) for kind in ("conversation", "description", "reasoning")
    ]
    shards = tmp_path / "shards"
    source = generation.out / "records.jsonl"
    convert(
        Conversion(reader="messages", source=source, images=tmp_path, target=shards, name="made"),
        processes=1, progress=False,
    )  # fmt: skip
    samples = [open_source(shards, cache=tmp_path / "cache").read(n) for n in range(9)]
    talk = next(s for s in samples if s.meta["task"] == "conversation")
    assert [m.text for m in talk.messages] == [
        "What is there?", "There is a dog.", "Where is it?", "It is on the left.",
    ]  # fmt: skip
    assert talk.messages[0].content[0] == ImageRef(0)
    assert talk.images == (picture(100, 50),)
    stated = {name: talk.meta[name] for name in ("split", "model", "seen", "wording")}
    assert stated == {"split": "train", "model": "m", "seen": "text", "wording": 0}


def test_the_picture_itself_is_sent(tmp_path: Path) -> None:
    with LlmServer(good) as server:
        run(settings(tmp_path, server, count=1, see="image", kinds=["description"]))
        run(settings(tmp_path, server, count=1, see="both", kinds=["description"], max_side=40))
    image, text = server.requests[0]["messages"][-1]["content"]
    assert image["image_url"]["url"] == "data:image/jpeg;base64," + base64.b64encode(picture(100, 50)).decode()
    assert text["text"] == "Write the description."
    image, text = server.requests[1]["messages"][-1]["content"]
    smaller = base64.b64decode(image["image_url"]["url"].partition(",")[2])
    assert read_size(smaller) == (40, 20)
    assert "- Dog number 0." in text["text"]


def test_failures_on_the_way_change_nothing_in_the_end(tmp_path: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Answer:
        return {
            0: Answer(status=429, headers={"Retry-After": "0.1"}),
            1: Answer(status=500),
            3: Answer(body=b'{"choices": [{"mess'),
            4: Answer(body=said("cut").body[:30], claims=400),
            5: Answer(status=503),
        }.get(number) or good(body, number)

    with LlmServer(good) as server:
        expected = settings(tmp_path / "a", server)
        run(expected)
    with LlmServer(script) as server:
        generation = settings(tmp_path / "b", server, endpoint={"tries": 6})
        assert run(generation).done == 9
        assert len(server.requests) == 14
    assert records(generation) == records(expected)


def test_rejected_answers_are_noted_with_the_reason_and_asked_again(tmp_path: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Answer:
        if "Dog number 1." in body["messages"][-1]["content"]:
            return said("The caption says it.")
        return said("Q: One?\nA:") if number == 0 else said(written(body), reason="length" if number == 1 else "stop")

    with LlmServer(script) as server:
        generation = settings(tmp_path, server, kinds=["conversation"], reask=1, endpoint={"concurrency": 1})
        outcome = run(generation)
        assert (outcome.done, outcome.rejected) == (1, 2)
        asked = len(server.requests)
        assert run(generation).rejected == 2  # given up for good: a second run asks nothing
        assert len(server.requests) == asked == 2 + 2 + 1
    reasons = Counter(entry.get("reason", "good").partition(":")[0] for entry in journal(generation))
    assert reasons == {
        "a conversation of 1 exchanges; 2 to 12 are taken": 1,
        "the answer was cut off": 1,
        'no "Q': 2,
        "good": 1,
    }
    assert [r["id"] for r in records(generation)] == ["r2"]


def test_what_failed_is_asked_again_by_the_next_run(tmp_path: Path) -> None:
    with LlmServer(lambda body, n: Answer(status=400, body=b"too long") if n == 0 else good(body, n)) as server:
        generation = settings(tmp_path, server, kinds=["reasoning"], endpoint={"concurrency": 1})
        first = run(generation)
        assert (first.done, first.failed) == (2, 1)
        assert journal(generation)[0]["reason"] == "HTTP 400: too long"
        second = run(generation)
    assert (second.done, second.failed) == (3, 0)
    assert len(server.requests) == 4


def test_killed_at_any_moment_nothing_that_was_answered_is_asked_again(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mmit.data.generate.settings import load_generation;"
        "from mmit.data.generate.run import generate; generate(load_generation(Path(sys.argv[1])), progress=False)"
    )
    config = tmp_path / "generate.yaml"

    def slow(body: dict[str, Any], number: int) -> Answer:
        time.sleep(0.05)
        return good(body, number)

    with LlmServer(slow) as server:
        generation = settings(tmp_path, server, count=20, kinds=["description", "reasoning"])
        config.write_text(yaml.safe_dump(json.loads(generation.model_dump_json(exclude_none=True))))
        child = subprocess.Popen([sys.executable, "-c", code, str(config)], env={**os.environ, "OMP_NUM_THREADS": "1"})
        while len(server.requests) < 9 and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert len(server.requests) < 40
        assert not (generation.out / "records.jsonl").exists()
        with (generation.out / "journal.jsonl").open("a") as file:
            file.write('{"key": "half a li')  # as a loss of power would leave it
        finished = {entry["key"] for entry in journal_lines(generation)}
        asked_before = len(server.requests)
        assert run(load_generation(config)).done == 40
        assert len(server.requests) - asked_before == 40 - len(finished)
    assert len(finished) >= 5
    assert len(journal(generation)) == len({entry["key"] for entry in journal(generation)}) == 40
    assert len(records(generation)) == 40


def journal_lines(generation: Generation) -> list[dict[str, Any]]:
    lines = (generation.out / "journal.jsonl").read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def test_another_prompt_or_model_is_another_question(tmp_path: Path) -> None:
    with LlmServer(good) as server:
        run(settings(tmp_path, server, count=1, kinds=["reasoning"]))
        run(settings(tmp_path, server, count=1, kinds=["reasoning"]))
        assert len(server.requests) == 1
        run(settings(tmp_path, server, count=1, kinds=["reasoning"], endpoint={"model": "other"}))
        run(settings(tmp_path, server, count=1, kinds=["reasoning"], endpoint={"temperature": 0}))
        assert len(server.requests) == 3


def test_the_cost_stays_below_its_bound_over_all_runs(tmp_path: Path) -> None:
    # 100 + 20 tokens at 1000 and 5000 a million: 0.2 an answer; the longest would be 0.1 + 0.25
    price = {"price": {"prompt": 1000, "completion": 5000}, "kinds": ["conversation"], "max_cost": 1.0}
    with LlmServer(good) as server:
        generation = settings(tmp_path, server, count=9, **price, endpoint={"max_tokens": 50})
        outcome = run(generation)
        # a prompt is taken for 1/3 of its characters until the first answer states its tokens
        assert 0 < outcome.cost <= 1.0
        assert outcome.cost == pytest.approx(0.2 * outcome.done)
        assert outcome.left == 9 - outcome.done > 0
        assert outcome.stopped == "max_cost 1"
        assert "not asked" in str(outcome)
        again = run(generation)
        assert (again.done, again.left) == (outcome.done, outcome.left)
        more = generation.model_copy(update={"max_cost": 10.0})
        assert run(more).done == 9
    assert len(server.requests) == 9


def test_a_limit_takes_the_first_annotations(tmp_path: Path) -> None:
    with LlmServer(good) as server:
        generation = settings(tmp_path, server, limit=2, kinds=["description"])
        assert run(generation).done == 2
    assert [r["id"] for r in records(generation)] == ["r0", "r1"]


def test_the_key_comes_from_its_variable_and_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(body: dict[str, Any], number: int) -> Answer:
        return Answer(status=400, body=b"bad key s3cret-key") if number == 0 else good(body, number)

    with LlmServer(script) as server:
        generation = settings(tmp_path, server, count=2, endpoint={"api_key_env": "TEST_LLM_KEY"})
        monkeypatch.delenv("TEST_LLM_KEY", raising=False)
        with pytest.raises(ConfigError, match="variable TEST_LLM_KEY holds no key"):
            run(generation)
        assert not generation.out.exists()
        monkeypatch.setenv("TEST_LLM_KEY", "s3cret-key")
        run(generation)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer s3cret-key"}
    written_files = [path.read_bytes() for path in generation.out.iterdir()]
    assert written_files
    assert not any(b"s3cret-key" in content for content in written_files)


def test_a_key_that_is_not_accepted_ends_the_run_and_keeps_what_was_there(tmp_path: Path) -> None:
    with LlmServer(lambda body, n: good(body, n) if n < 3 else Answer(status=401)) as server:
        generation = settings(tmp_path, server, count=30, kinds=["description"])
        with pytest.raises(ConfigError, match="the key is not accepted: HTTP 401"):
            run(generation)
        assert len(server.requests) <= 3 + 2
    assert len(records(generation)) == 3


def test_answers_that_are_never_good_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "PATIENCE", 5)
    with LlmServer(lambda body, n: said("No.")) as server:
        generation = settings(tmp_path, server, count=30, kinds=["description"])
        with pytest.raises(
            DataError, match="5 questions in a row had no good answer, the last: rejected: a description"
        ):
            run(generation)
        assert len(server.requests) <= 5 + 2


def test_ctrl_c_keeps_what_is_under_way(tmp_path: Path) -> None:
    fired: list[bool] = []

    def script(body: dict[str, Any], number: int) -> Answer:
        if number == 4:
            fired.append(True)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        return good(body, number)

    with LlmServer(script) as server:
        generation = settings(tmp_path, server, count=20, kinds=["description"])
        with pytest.raises(Interrupted, match="the same command asks for the rest"):
            run(generation)
        answered = len(server.requests)
        assert fired
        assert answered < 20
        assert len(records(generation)) == answered
        assert run(generation).done == 20
    assert len(server.requests) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"endpoint": {"model": "m"}}, "endpoint.base_url: Field required"),
        ({"endpoint": {"base_url": "http://h/v1", "model": "m", "api_key": "k"}}, "endpoint.api_key: Extra inputs"),
        ({"endpoint": {"base_url": "http://h/v1", "model": "m", "body": {"model": "x"}}}, "'model' is not set here"),
        ({"max_cost": 1}, "max_cost needs the price of a million tokens"),
        ({"kinds": ["poem"]}, "kinds.0"),
        ({"boxes": "yxyx"}, "boxes"),
    ],
)
def test_a_mistake_in_the_settings_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = {"endpoint": {"base_url": "http://h/v1", "model": "m"}, "source": "a.jsonl", "out": "out", **change}
    path = tmp_path / "generate.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=message) as caught:
        load_generation(path)
    assert str(caught.value).startswith(str(path))


def test_options_change_the_top_level_of_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "generate.yaml"
    endpoint = {"base_url": "http://h/v1/", "model": "m", "timeout": "3e1"}  # YAML reads 3e1 as text
    path.write_text(yaml.safe_dump({"endpoint": endpoint, "source": "a.jsonl", "out": "out"}))
    found = load_generation(path, {"limit": 5})
    assert (found.limit, found.endpoint.base_url, found.endpoint.timeout) == (5, "http://h/v1", 30.0)


def test_annotations_that_say_nothing_are_counted_and_limited(tmp_path: Path) -> None:
    with LlmServer(good) as server:
        generation = settings(tmp_path, server, count=3, kinds=["reasoning"])
        with generation.source.open("a") as file:
            file.write('{"id": "empty", "image": "a.jpg"}\n')
        with pytest.raises(DataError, match=r"1 bad annotations of 4 .*record 3: it has neither captions nor boxes"):
            run(generation)
        outcome = run(generation.model_copy(update={"max_bad": 0.5}))
    assert (outcome.done, len(outcome.bad)) == (3, 1)
    assert len(server.requests) == 3


def test_two_runs_at_a_time_are_refused(tmp_path: Path) -> None:
    with LlmServer(good) as server:
        generation = settings(tmp_path, server, count=1)
        with Journal(generation.out), pytest.raises(DataError, match="another process is generating into it"):
            run(generation)


def test_a_damaged_journal_is_named_by_its_line(tmp_path: Path) -> None:
    with LlmServer(good) as server:
        generation = settings(tmp_path, server, count=1)
        run(generation)
        path = generation.out / "journal.jsonl"
        path.write_text("{}\n" + path.read_text())
        with pytest.raises(DataError, match=r"journal\.jsonl:1: is no line of a journal"):
            run(generation)


def test_no_usage_and_a_bound_on_the_cost_do_not_go_together(tmp_path: Path) -> None:
    with LlmServer(lambda body, n: said(written(body), usage=False)) as server:
        generation = settings(
            tmp_path, server, count=9, max_cost=100.0, price={"prompt": 1, "completion": 1}, kinds=["reasoning"]
        )
        with pytest.raises(ConfigError, match="states no usage, so max_cost cannot be kept"):
            run(generation)
        assert len(server.requests) <= 3
        assert run(generation.model_copy(update={"max_cost": 0.0})).done == 9


def test_mmits_own_server_can_be_asked(tmp_path: Path) -> None:
    section = tiny_model_section(tmp_path / "parts", "siglip_qwen2")
    loaded = build_model(ComposedModel.model_validate(section), dtype=torch.float32, seed=0)
    prompts = {"given": {"image": ""}, **{kind: {"system": "Talk.", "request": "Now.", "questions": ["What?"]}
               for kind in ("conversation", "description", "reasoning")}}  # fmt: skip
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(prompts))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(loaded, "tiny"), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        endpoint = {"model": "tiny", "max_tokens": 5, "timeout": 30}
        generation = settings(
            tmp_path, url, count=2, see="image", endpoint=endpoint, reask=0, kinds=["description"],
            prompts=tmp_path / "prompts.yaml",
        )  # fmt: skip
        outcome = run(generation)
        server.should_exit = True
        thread.join()
    # random weights write nothing worth keeping, but each answer came, was counted, and was judged
    assert (outcome.rejected + outcome.done, outcome.failed, outcome.usage.answers) == (2, 0, 2)
    assert outcome.usage.prompt_tokens > 2
    assert 0 < outcome.usage.completion_tokens <= 10
