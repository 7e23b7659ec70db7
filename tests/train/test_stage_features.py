"""Cached features in a stage: the losses of the pictures, no tower, whole model directories, stale folders refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import make_run
from torch import Tensor

from mmit.config import RunConfig, load_config
from mmit.data.features import FeatureStore, open_folder
from mmit.errors import ConfigError, DataError
from mmit.models import build_model, load_model, save_model
from mmit.models.absent import AbsentTower, made_whole
from mmit.models.tower import parts_of, read_tower_alone
from mmit.train.feature_cache import cache_features
from mmit.train.features import StageFeatures, look_at, maker_of, stage_features
from mmit.train.feed import Feed, make_feed
from mmit.train.loop import StopRequest
from mmit.train.prediction import predict

RECORDS = 85
PICTURES = 68
"""Four of five records have a picture, each another one."""

TILED = 'model.tiling={"type": "anyres", "several": "whole"}'


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards in which one picture is damaged behind its header."""
    folder = tmp_path_factory.mktemp("features")
    path = make_run(folder, records=RECORDS)
    [tar] = (folder / "shards").glob("*.tar")
    content = bytearray(tar.read_bytes())
    start = content.index(b"IDAT", content.index(b".0.png"))
    content[start + 6 : start + 16] = bytes(10)
    tar.write_bytes(content)
    manifest = folder / "shards" / "manifest.json"
    manifest.write_text(manifest.read_text())
    return path


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


def config_of(run_file: Path, folder: Path, *overrides: str, missing: str = "compute") -> RunConfig:
    given = (f"stages.align.data.features={folder}", f"stages.align.data.missing_features={missing}")
    others = ("stages.align.data.workers=0", "stages.align.data.max_skipped=0.5", "stages.align.epochs=1")
    return load_config(run_file, [*given, *others, f"output={folder.parent / 'run'}", *overrides])


def features_of(config: RunConfig, stop: StopRequest, dtype: torch.dtype = torch.float32) -> StageFeatures:
    config.stage_folder("align").mkdir(parents=True, exist_ok=True)
    found = stage_features(config, "align", dtype=dtype, stop=stop)
    assert found is not None
    return found


def losses(feed: Feed, model: torch.nn.Module) -> tuple[list[float], list[str], int]:
    """The loss of every micro-batch, the samples that were left out, and the number of tiles."""
    found, holes, tiles = [], [], 0
    with torch.no_grad():
        for step in feed.loader(start_step=0):
            found += [float(model(batch)) for batch in step.batches]
            holes += [f"{hole.key} {hole.reason}" for _, hole in step.skipped]
            tiles += sum(batch.tiles for batch in step.batches)
    return found, holes, tiles


@pytest.mark.parametrize(
    ("dtype", "overrides"), [(torch.bfloat16, ()), (torch.float32, ()), (torch.bfloat16, (TILED,))]
)
def test_losses_are_those_of_the_pictures(
    run_file: Path, tmp_path: Path, stop: StopRequest, dtype: torch.dtype, overrides: tuple[str, ...]
) -> None:
    config = config_of(run_file, tmp_path / "features", *overrides)
    features = features_of(config, stop, dtype)
    whole = build_model(config.model, dtype=dtype, seed=0)
    bare = build_model(config.model, dtype=dtype, seed=0, tower=features.tower)
    assert not [name for name, _ in bare.model.named_parameters() if name.startswith("vision_tower")]

    seen, holes, tiles = losses(make_feed(config, config.stages["align"], whole), whole.model)
    taken, same_holes, same_tiles = losses(make_feed(config, config.stages["align"], bare, features), bare.model)
    assert tiles == same_tiles > PICTURES - 2
    assert len(holes) == 1
    assert "damaged" in holes[0]
    assert same_holes == holes
    if dtype == torch.bfloat16:
        assert taken == seen  # the tower gives bf16: nothing is rounded
    else:
        # features keep 8 bits: 2**-9 of each, which averages out over 24 of them and 2 layers of a connector
        assert taken == pytest.approx(seen, rel=2e-3)
        assert taken != seen


def test_a_run_without_a_tower_writes_the_whole_model(run_file: Path, tmp_path: Path, stop: StopRequest) -> None:
    config = config_of(run_file, tmp_path / "features")
    features = features_of(config, stop)
    bare = build_model(config.model, dtype=torch.float32, seed=0, tower=features.tower)
    whole = build_model(config.model, dtype=torch.float32, seed=0)
    model, weights = made_whole(bare.model, features.file)
    written = replace(bare, model=model)
    save_model(written, {**bare.model.state_dict(), **weights}, tmp_path / "bare", made_from={})
    save_model(whole, None, tmp_path / "whole", made_from={})
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "bare" / file.name).read_bytes() == file.read_bytes(), file.name
    assert isinstance(bare.model.vision_tower, AbsentTower)
    opened = load_model(tmp_path / "bare", dtype=torch.float32)
    assert opened.model.state_dict().keys() == whole.model.state_dict().keys()


def test_the_same_tower_is_known_wherever_it_is_read_from(run_file: Path, tmp_path: Path) -> None:
    config = config_of(run_file, tmp_path / "features")
    whole = build_model(config.model, dtype=torch.float32, seed=0)
    save_model(whole, None, tmp_path / "model", made_from={})
    reopened = load_config(run_file, [f'model={{"path": "{tmp_path / "model"}"}}']).model
    towers = [
        read_tower_alone(config.model, weights=None, dtype=torch.float32),
        read_tower_alone(config.model, weights=tmp_path / "model", dtype=torch.float32),
        read_tower_alone(reopened, weights=None, dtype=torch.float32),
    ]
    parts = [parts_of(tower, whole.model.spec) for tower in towers]
    assert parts[0] == parts[1] == parts[2]

    changed = {**whole.model.state_dict()}
    name = next(name for name in changed if name.startswith("vision_tower") and name.endswith("bias"))
    changed[name] = changed[name] + 1e-3
    save_model(whole, changed, tmp_path / "trained", made_from={})
    trained = parts_of(
        read_tower_alone(config.model, weights=tmp_path / "trained", dtype=torch.float32), whole.model.spec
    )
    assert {part for part in trained if trained[part] != parts[0][part]} == {"weights"}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.encoder.layer=-3", "layer was -2 and is -3"),
        ("model.encoder.resize=crop", "image resize was pad and is crop"),
        ("model.encoder.cls=keep", "cls was drop and is keep"),
        (TILED, "image tiling was not set and is {"),
        ("precision=bf16", "precision was float32 and is bfloat16"),
    ],
)
def test_a_stale_cache_is_refused_by_what_changed(run_file: Path, tmp_path: Path, override: str, told: str) -> None:
    config = config_of(run_file, tmp_path / "features")
    before = look_at(config, "align", dtype=torch.float32)
    open_folder(before.folder, before.kind, create=True)
    now = config_of(run_file, tmp_path / "features", override)
    look = look_at(now, "align", dtype=torch.bfloat16 if now.precision == "bf16" else torch.float32)
    with pytest.raises(DataError, match="its features were made otherwise: ") as caught:
        open_folder(look.folder, look.kind, create=True)
    assert told in str(caught.value)


def killed_in_the_middle(make: Callable[[Callable[[], None]], object]) -> None:
    """Run ``make`` in a child that is killed, as by kill -9, at its second pass of the tower."""
    child = os.fork()
    if child == 0:
        passes = [0]

        def kill_at_second() -> None:
            passes[0] += 1
            if passes[0] == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        make(kill_at_second)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_the_command_goes_on_after_kill_minus_nine_and_says_first_what_it_brings(
    run_file: Path, tmp_path: Path, stop: StopRequest
) -> None:
    config = config_of(run_file, tmp_path / "features", missing="error")
    with pytest.raises(DataError, match="holds no features"):
        features_of(config, stop)
    look = look_at(config, "align", dtype=torch.float32)
    open_folder(look.folder, look.kind, create=True)
    maker = maker_of(look, device=torch.device("cpu"), workers=0)
    killed_in_the_middle(lambda check: maker.make(look.plan, look.pictures.places, check_stop=check, progress=False))
    half = len(FeatureStore(look.folder, look.kind))
    assert 0 < half < PICTURES
    with pytest.raises(DataError, match=r"does not hold the pictures of stage align: run `mmit data cache`"):
        features_of(config, stop)

    said: list[str] = []
    before = (look.folder / "000000.features").read_bytes()
    cache_features(config, "align", [], ranks=1, say=said.append)
    assert (look.folder / "000000.features").read_bytes() == before  # nothing is made twice
    assert len(FeatureStore(look.folder, look.kind)) == PICTURES
    assert f"{PICTURES} samples with {PICTURES} tiles of 192 bytes: at most 13.1 KB" in said[0]
    assert "times as fast" in said[1]
    assert said[2].endswith(f"features of {PICTURES} pictures")
    assert features_of(config, stop).read.store.folder == look.folder  # and the stage finds all of them


def test_a_picture_that_is_not_there_ends_the_run_by_its_record(
    run_file: Path, tmp_path: Path, stop: StopRequest
) -> None:
    config = config_of(run_file, tmp_path / "features")
    features = features_of(config, stop)
    for path in features.read.store.folder.glob("0*"):
        path.unlink()
    bare = build_model(config.model, dtype=torch.float32, seed=0, tower=features.tower)
    empty = replace(
        features, read=replace(features.read, store=FeatureStore(tmp_path / "features", features.read.store.kind))
    )
    with pytest.raises(
        DataError, match=r"record 'tiny/\d+', image 0: its features are not in .* run `mmit data cache` again"
    ):
        losses(make_feed(config, config.stages["align"], bare, empty), bare.model)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("stages.align.train.vision_tower=1e-4",), "the rule 'vision_tower' trains the vision tower"),
        (('stages.align.train={"connector": 1e-3, "q_proj": 1e-4}',), "the rule 'q_proj' trains the vision tower"),
        (('stages.align.lora={"targets": ["q_proj$"]}', "stages.align.train.lora=1e-4"), "lora.targets: 'q_proj$'"),
    ],
)
def test_a_stage_that_trains_the_tower_cannot_read_features(
    run_file: Path, tmp_path: Path, overrides: tuple[str, ...], told: str
) -> None:
    with pytest.raises(ConfigError, match=r"set data.features to none") as caught:
        look_at(config_of(run_file, tmp_path / "features", *overrides), "align", dtype=torch.float32)
    assert told in str(caught.value)


def test_rules_that_freeze_the_absent_tower_are_no_mistake(run_file: Path, tmp_path: Path) -> None:
    config = config_of(run_file, tmp_path / "features", "stages.align.train.vision_tower=0")
    look = look_at(config, "align", dtype=torch.float32)
    bare = build_model(config.model, dtype=torch.float32, seed=0, tower=AbsentTower(look.tower.module))
    assert [group.pattern for group in bare.model.train_only(config.stages["align"].train)] == ["connector"]


def test_the_prediction_counts_operations_by_the_formulas(run_file: Path, tmp_path: Path) -> None:
    config = config_of(run_file, tmp_path / "features")
    look = look_at(config, "align", dtype=torch.float32)
    found = predict(config, "align", look)
    # CLIP of 2 run layers of 3, width 24, inner 48, 5 positions, patches of 14 x 14: by hand
    tower = 2 * 2 * 5 * (4 * 24**2 + 2 * 24 * 48) + 2 * 4 * 5**2 * 24 + 4 * 2 * 24 * 3 * 14**2
    assert found.tower == PICTURES * tower
    tokens, trained = (
        sum(int(table.rows[column][look.plan.sample_of].sum()) for table in look.plan.tables)
        for column in ("tokens", "trained")
    )
    squares = sum(int((table.tokens[look.plan.sample_of].astype(int) ** 2).sum()) for table in look.plan.tables)
    vocabulary = json.loads((run_file.parent / "parts" / "llama" / "config.json").read_text())["vocab_size"]
    layers = 2 * (4 * 32**2 + 3 * 32 * 64)
    assert found.rest == 4 * layers * tokens + 6 * 2 * 32 * squares + 4 * 32 * vocabulary * trained
    assert found.gain == pytest.approx((found.tower + found.rest) / found.rest)
    twice = replace(found, epochs=2)
    assert twice.gain_in_all == pytest.approx(2 * (found.tower + found.rest) / (found.tower + 2 * found.rest))
    with pytest.raises(DataError, match=r"may need 13.1 KB more and 1 KB are free; free some, or name a folder"):
        replace(found, free=1000).check_room()


def test_a_part_of_the_pictures_is_each_ranks_and_all_are_all(run_file: Path, tmp_path: Path) -> None:
    pictures = look_at(config_of(run_file, tmp_path / "features"), "align", dtype=torch.float32).pictures
    shares: list[Tensor] = [torch.from_numpy(np.concatenate(pictures.share(rank, 3))) for rank in range(3)]
    assert torch.equal(torch.cat(shares), torch.from_numpy(pictures.places))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
