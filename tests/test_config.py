"""The run file: typed, strict, all mistakes at once."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from mmit.config import (
    Batching,
    ComposedModel,
    CustomPart,
    Data,
    TransformersEncoder,
    WholeModel,
    load_config,
    parse_count,
)
from mmit.config_file import json_schema, parse, resolved_yaml
from mmit.errors import ConfigError

RUN = """
name: tiny
model:
  encoder: {type: transformers, path: clip}
  language_model: {path: llm}
stages:
  align:
    train: {connector: 1e-3}
    data: {mix: [{shards: a}], template: plain}
    batch: {length: 2048, tokens_per_step: 160k}
  instruct:
    init_from: align
    train: {connector: 2e-5, language_model: 2.0e-5}
    data: {mix: [{shards: a}, {recipe: mine, epochs: 3}]}
    batch: {length: 4096, tokens_per_step: 160k}
"""


def mistakes(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, source="run.yaml", overrides=list(overrides))
    return str(caught.value).splitlines()


def test_2e_minus_5_is_a_float_however_it_is_written() -> None:
    config = parse(RUN, source="run.yaml", overrides=["stages.align.train.language_model=1e5"])
    assert config.stages["align"].train == {"connector": 0.001, "language_model": 100000.0}
    assert config.stages["instruct"].train == {"connector": 2e-5, "language_model": 2e-5}


def test_k_means_1024() -> None:
    assert parse_count("160k") == 163840
    assert parse(RUN, source="", overrides=[]).stages["instruct"].batch.rows_per_step == 40


def test_all_mistakes_of_a_file_are_told_at_once_with_their_paths() -> None:
    wrong = RUN.replace("path: clip", "path: clip, resiz: pad").replace("length: 2048", "length: two")
    wrong = wrong.replace("init_from: align", "init_form: align").replace("shards: a}, {", "shards: a, recipe: b}, {")
    assert mistakes(wrong) == [
        "run.yaml: 4 mistakes",
        "  model.encoder.resiz: unknown key - did you mean 'resize'?",
        "  stages.align.batch.length: input should be a valid integer, unable to parse string as an integer "
        "(given: 'two')",
        "  stages.instruct.data.mix.0: give exactly one of 'recipe' and 'shards'",
        "  stages.instruct.init_form: unknown key - did you mean 'init_from'?",
    ]


def test_an_unknown_key_of_an_override_is_refused_like_one_of_the_file() -> None:
    assert mistakes(RUN, "stages.align.trian.connector=1")[1:] == [
        "  stages.align.trian: unknown key - did you mean 'train'?"
    ]


def test_an_override_leaves_what_an_alias_repeats_elsewhere() -> None:
    repeated = RUN.replace("data: {mix: [{shards: a}], ", "data: &data {mix: [{shards: a}], ")
    repeated = repeated.replace("data: {mix: [{shards: a}, {recipe: mine, epochs: 3}]}", "data: *data")
    stages = parse(repeated, source="", overrides=["stages.instruct.data.mix.0.limit=5"]).stages
    assert [stages[name].data.mix[0].limit for name in ("align", "instruct")] == [0, 5]
    stages = parse(repeated, source="", overrides=["stages.align.data.workers=7"]).stages
    assert [stages[name].data.workers for name in ("align", "instruct")] == [7, 2]


def test_overrides_reach_into_lists() -> None:
    config = parse(RUN, source="", overrides=["stages.instruct.data.mix.1.epochs=2"])
    assert config.stages["instruct"].data.mix[1].epochs == 2.0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("noequals", "not of the form a.b=value"),
        ("stages.instruct.data.mix.7.epochs=1", "needs a number below 2"),
        ("name.first=x", "'name' holds the value 'tiny'"),
    ],
)
def test_a_malformed_override_is_one_sentence(override: str, words: str) -> None:
    assert words in mistakes(RUN, override)[0]


def test_an_impossible_batch_shows_the_arithmetic() -> None:
    assert mistakes(RUN, "stages.align.batch.tokens_per_step=5000")[1] == (
        "  stages.align.batch: tokens_per_step 5000 = 2 rows x length 2048 + 904 left over; take 4096 or 6144"
    )
    assert (
        "20 rows per step, which rows_per_micro_batch 3 does not divide"
        in mistakes(RUN, "stages.align.batch={length: 512, tokens_per_step: 10k, rows_per_micro_batch: 3}")[1]
    )


def test_a_key_given_twice_is_refused_with_its_line() -> None:
    assert mistakes(RUN + "name: again\n") == ["run.yaml: line 16 column 1 is not YAML: the key 'name' is given twice"]


def test_broken_yaml_is_refused_with_its_place() -> None:
    assert mistakes("name: [a")[0].startswith("run.yaml: line 1 column 9 is not YAML")


@pytest.mark.parametrize("text", ["", "- a", "42"])
def test_a_file_that_is_no_mapping_is_refused(text: str) -> None:
    assert "a run file holds keys such as name" in mistakes(text)[0]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=true", "true is no number"),
        ("stages.align.epochs=1000000000000", "less than or equal to 10000"),
        ("stages.align.train.connector=.inf", "finite number"),
        ("stages.align.optim.betas=[1, 1]", "less than 1"),
        ("seed=99999999999999999999999999", "less than"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(override: str, words: str) -> None:
    assert words in mistakes(RUN, override)[1]


@pytest.mark.parametrize("value", ["2020-13-45", "{{ name }}", "!!int abc", "[" * 3000, "1" * 5000])
def test_what_yaml_itself_stumbles_over_is_one_sentence(value: str) -> None:
    assert mistakes(f"name: {value}")[0].startswith("run.yaml:")


def test_merge_keys_work() -> None:
    merged = RUN.replace(
        "batch: {length: 2048, tokens_per_step: 160k}", "batch: &b {length: 2048, tokens_per_step: 160k}"
    )
    merged = merged.replace("batch: {length: 4096, tokens_per_step: 160k}", "batch: {<<: *b, length: 4096}")
    batch = parse(merged, source="run.yaml", overrides=[]).stages["instruct"].batch
    assert (batch.length, batch.tokens_per_step) == (4096, 163840)


def test_an_output_folder_may_hold_braces() -> None:
    config = parse(RUN, source="", overrides=["output=runs/{name}/{x}"])
    assert config.folder == Path("runs/tiny/{x}")


def test_a_stage_cannot_start_from_a_later_one() -> None:
    assert mistakes(RUN, "stages.align.init_from=instruct")[1] == (
        "  stages.align.init_from: 'instruct' is not a stage before it"
    )


def test_a_rule_that_is_no_regular_expression_is_refused() -> None:
    assert "'[' is no regular expression" in mistakes(RUN, "stages.align.train={'[': 1}")[1]


def test_training_nothing_is_refused() -> None:
    assert "nothing would be trained" in mistakes(RUN, "stages.align.train.connector=0")[1]


def test_an_unknown_encoder_type_names_those_that_exist() -> None:
    assert mistakes(RUN, "model.encoder.type=clipp")[1] == (
        "  model.encoder: 'type' must be one of transformers, open_clip, timm, or package.module:Class (it may be left "
        "out where 'path' is a directory whose config.json has a model_type: transformers)"
    )


def test_an_encoder_that_only_names_a_directory_is_told_by_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    config = parse(RUN, source="", overrides=[f"model.encoder={{path: '{tmp_path}'}}"])
    assert isinstance(config.model, ComposedModel)
    assert isinstance(config.model.encoder, TransformersEncoder)
    (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch16_224"}')  # as timm writes it
    assert "'type' must be one of" in mistakes(RUN, f"model.encoder={{path: '{tmp_path}'}}")[1]


def test_ones_own_encoder_is_a_module_and_a_class() -> None:
    config = parse(RUN, source="", overrides=["model.encoder={type: 'mine.towers:Tower', args: {width: 3}}"])
    assert isinstance(config.model, ComposedModel)
    assert isinstance(config.model.encoder, CustomPart)
    assert config.model.encoder.args == {"width": 3}


def test_a_whole_model_is_a_path() -> None:
    config = parse(RUN, source="", overrides=["model={path: some/dir}"])
    assert config.model == WholeModel(path="some/dir")


def test_the_resolved_config_reads_back_equal() -> None:
    config = parse(RUN, source="", overrides=["stages.align.data.mix.0.samples=5"])
    again = parse(resolved_yaml(config), source="", overrides=[])
    assert again == config


def test_the_config_is_frozen() -> None:
    config = parse(RUN, source="", overrides=[])
    with pytest.raises(ValueError, match="frozen"):
        setattr(config, "name", "other")  # noqa: B010  (a plain assignment is refused by the type checker already)


def test_the_schema_documents_every_field() -> None:
    schema = json_schema()
    parts = ("model", "connector", "encoder", "language_model")
    sections = ("batch", "data", "optim", "zero", "parallel", "save", "log")
    named_by_their_section = {"type", "betas", "eps", *parts, *sections}
    for section in schema["$defs"].values():
        for name, field in section.get("properties", {}).items():
            if name not in named_by_their_section:
                assert field.get("description"), name
    assert schema["properties"]["stages"]["description"] == "Trained in this order."


def test_rows_per_step_is_derived() -> None:
    assert Batching.model_validate({"length": "2k", "tokens_per_step": "16k"}).rows_per_step == 8


def test_yaml_no_and_numbers_stay_what_the_schema_says() -> None:
    assert yaml.safe_load("2e-5") == "2e-5"  # the trap: YAML 1.1 reads a string
    config = parse(RUN, source="", overrides=["seed=7", "stages.align.log.tensorboard=no"])
    assert (config.seed, config.stages["align"].log.tensorboard) == (7, False)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"mix": [{"shards": "a", "weight": 1, "samples": 3}]}, "give only one of 'epochs', 'samples' and 'weight'"),
        ({"mix": [{"shards": "a", "weight": 1}, {"shards": "b"}], "samples_per_epoch": 9}, "give all of them one"),
        ({"mix": [{"shards": "a", "weight": 1}]}, "share out 'samples_per_epoch', which is missing"),
        ({"mix": [{"shards": "a"}], "sampling": "sqrt"}, "share out 'samples_per_epoch', which is missing"),
        ({"mix": [{"shards": "a"}], "samples_per_epoch": 9}, "and there are none"),
        ({"mix": [{"shards": "a", "epochs": 2}], "sampling": "sqrt", "samples_per_epoch": 9}, "sqrt decides the draws"),
        ({"mix": [{"shards": "a", "subset": "some 10%"}]}, "'some 10%' is none of all, first N"),
        ({"mix": [{"shards": "a", "subset": "first 110%"}]}, "'first 110%' is none of all"),
        ({"mix": [{"shards": "a", "subset": "last 0"}]}, "'last 0' is none of all"),
        ({"mix": [{"shards": "a"}], "text_share": 0.5}, "'text_share' belongs to batches: paired"),
    ],
)
def test_draws_that_contradict_each_other_are_refused(data: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        Data.model_validate(data)


def test_a_mixture_by_weight_with_subsets_is_understood() -> None:
    capped = {"recipe": "b", "weight": 1, "per_task": 10, "limit": 5}
    mix = [{"shards": "a", "weight": 3, "subset": "random 1%"}, capped]
    data = Data.model_validate({"mix": mix, "samples_per_epoch": 100})
    assert [source.weight for source in data.mix] == [3, 1]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "stages.align.zero.stage=7",
            "stages.align.zero.stage: input should be less than or equal to 3, or 'auto' (given: 7)",
        ),
        ("stages.align=3", "stages.align: keys and values belong below it (given: 3)"),
    ],
)
def test_a_key_that_takes_several_kinds_of_values_is_told_once(override: str, words: str) -> None:
    assert mistakes(RUN, override) == ["run.yaml: one mistake", f"  {words}"]


def test_a_folder_in_place_of_a_run_file_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; a run file is a YAML"):
        load_config(tmp_path)
