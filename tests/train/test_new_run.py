"""``mmit new`` beyond what docs/finetune.md shows: very few samples, held-out sets, and mistakes."""

from pathlib import Path

import pytest
from finetune_factories import make_model, make_photos

from mmit.config import load_config
from mmit.data.convert import Conversion, convert
from mmit.errors import ConfigError, DataError
from mmit.train.new_run import Sets, write_new_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model")))


def shards(folder: Path, *, count: int) -> str:
    target = folder / "my shards"
    source = make_photos(folder, count=count)
    convert(
        Conversion(reader="questions", source=source, images=folder / "photos", target=target, name="mine"),
        processes=1,
        progress=False,
    )
    return str(target)


def test_three_photos_make_a_run_that_says_what_it_cannot_see(tmp_path: Path, model: str) -> None:
    told = write_new_run(tmp_path / "my run.yaml", model, Sets(data=shards(tmp_path, count=3)))
    assert "held out: nothing, so few samples there are; overfitting will not be seen" in told
    config = load_config(tmp_path / "my run.yaml")
    stage = config.stages["tune"]
    assert (config.name, stage.evaluate, stage.save.keep_best) == ("my-run", None, False)
    assert stage.epochs * 3 >= 10


def test_a_held_out_set_leaves_all_samples_to_train_on(tmp_path: Path, model: str) -> None:
    data = shards(tmp_path, count=6)
    write_new_run(tmp_path / "run.yaml", model, Sets(data=data, held_out="elsewhere"))
    stage = load_config(tmp_path / "run.yaml").stages["tune"]
    assert stage.data.mix[0].subset == "all"
    assert stage.evaluate is not None
    assert (stage.evaluate.mix[0].shards, stage.evaluate.text) == ("elsewhere", "probe")
    with pytest.raises(ConfigError, match="exists; name another file"):
        write_new_run(tmp_path / "run.yaml", model, Sets(data=data))
    with pytest.raises(ConfigError, match="is what is trained on"):
        write_new_run(tmp_path / "other.yaml", model, Sets(data=data, held_out=data))


def test_a_table_in_place_of_shards_is_refused_with_what_to_do(tmp_path: Path, model: str) -> None:
    table = make_photos(tmp_path, count=1)
    with pytest.raises(DataError, match=r"photos\.csv: is no set of shards; make one with `mmit data convert"):
        write_new_run(tmp_path / "run.yaml", model, Sets(data=str(table)))
    assert not (tmp_path / "run.yaml").exists()
