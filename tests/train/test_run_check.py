"""A run file is checked against its parts without their weights: a model in the shape of 7 B in seconds."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from deepspeed.accelerator import get_accelerator
from factories import tiny_llama_tokenizer
from model_factories import tiny_clip_dir, tiny_model_section
from transformers import CLIPImageProcessor, CLIPVisionConfig, Gemma2Config, LlamaConfig, MambaConfig, PretrainedConfig

from mmit.config import ComposedModel, load_config
from mmit.errors import ConfigError
from mmit.models import build_model, save_model
from mmit.train.launch import run_stages
from mmit.train.run_check import DTYPE, RunReport, check_run, refuse_mistakes

BATCH = {"length": 2048, "tokens_per_step": 8192}


def run_file(folder: Path, model: dict[str, Any], **stages: dict[str, Any]) -> Path:
    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    (shards / "a.tar").touch()  # what is in it is not looked at
    data = {"mix": [{"shards": str(shards)}]}
    filled = {
        name: {"batch": BATCH, **stage, "data": {**data, **stage.get("data", {})}} for name, stage in stages.items()
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"name": "big", "model": model, "stages": filled}, sort_keys=False))
    return path


def described(folder: Path, config: PretrainedConfig) -> str:
    """A language model's directory without its weights."""
    tiny_llama_tokenizer(folder)
    config.save_pretrained(folder)
    return str(folder)


def checked(path: Path) -> RunReport:
    return check_run(load_config(path))


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """LLaVA-1.5-7B as its configurations describe it: CLIP ViT-L/14 of 336 pixels and Llama 2 of 7 B, no weights."""
    folder = tmp_path_factory.mktemp("big")
    llama = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, max_position_embeddings=4096
    )
    clip = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    clip.save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}).save_pretrained(
        folder / "clip"
    )
    return {
        "encoder": {"type": "transformers", "path": str(folder / "clip")},
        "language_model": {"path": described(folder / "llm", llama), "template": "vicuna"},
    }


def test_a_model_of_7_b_is_counted_without_weights(big: dict[str, Any], tmp_path: Path) -> None:
    path = run_file(
        tmp_path,
        big,
        align={"train": {"connector": 1e-3}, "data": {"template": "plain"}},
        instruct={
            "init_from": "align",
            "train": {"connector": 2e-5, "language_model": 2e-5, "vision_tower": 2e-6},
            "batch": {"length": 8192, "tokens_per_step": 8192},
            "zero": {"stage": 3},
        },
    )
    report = checked(path)
    assert report.mistakes == []
    lines = {name: [line.split() for line in table.splitlines()] for name, table in report.trains.items()}
    # the published sizes: 6.74 B, and a projector of 1024 x 4096 + 4096 x 4096 + 2 biases
    assert ["connector", "4", "20,979,712", "0.001"] in lines["align"]
    assert ["language_model", "(frozen)", "291", "6,738,415,616", "-"] in lines["align"]
    assert ["language_model", "291", "6,738,415,616", "2e-05"] in lines["instruct"]
    # the last of 24 layers (12.6 M) and the final norm stand behind layer -2 and do nothing
    assert ["vision_tower", "373", "290,909,184", "2e-06"] in lines["instruct"]
    assert report.notes == [
        "stages.instruct.batch.length: a sample may be as long as 8192 tokens, the language model was made for 4096"
    ]


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    model = {
        "encoder": {"type": "transformers", "path": str(tmp_path / "no_clip")},
        "language_model": {"path": str(tmp_path / "no_llm")},
    }
    path = run_file(
        tmp_path,
        model,
        one={"train": {"connector": 1e-3}, "zero": {"stage": 2, "extra": {"wall_clock_breakdwn": True}}},
        two={"train": {"connector": 1e-3}, "zero": {"extra": {"zero_optimization": {"offload_param": {}}}}},
    )
    with pytest.raises(ConfigError) as caught:
        refuse_mistakes(checked(path), path)
    head, *mistakes = str(caught.value).splitlines()
    assert head == f"{path}: 4 mistakes"
    for mistake, said in zip(mistakes, ("no_clip", "no_llm", "stages.one.zero.extra", "stages.two.zero"), strict=True):
        assert said in mistake


def test_parts_and_rules_that_do_not_fit_are_told(tmp_path: Path) -> None:
    model = tiny_model_section(tmp_path / "parts")
    path = run_file(
        tmp_path,
        model,
        one={"train": {"conector": 1e-3}},
        two={"train": {"connector": 1e-3}, "data": {"template": "no_such_template"}},
        three={"train": {"connector": 1e-3}, "init_from": str(tmp_path / "nothing")},
    )
    mistakes = checked(path).mistakes
    assert len(mistakes) == 3
    assert "the rule 'conector' matches no parameter" in mistakes[0]
    assert "no_such_template" in mistakes[1]
    assert "there is no model directory" in mistakes[2]


def test_a_model_that_cannot_be_packed_is_told(tmp_path: Path) -> None:
    mamba = MambaConfig(vocab_size=640, hidden_size=32, num_hidden_layers=2, state_size=8)
    model = {
        "encoder": {"type": "transformers", "path": str(tiny_clip_dir(tmp_path / "clip"))},
        "language_model": {"path": described(tmp_path / "mamba", mamba), "template": "vicuna"},
    }
    path = run_file(tmp_path, model, one={"train": {"connector": 1e-3}})
    [mistake] = checked(path).mistakes
    assert mistake.startswith("stages.one.batch.packing: MambaForCausalLM has layers of type linear_attention")


def test_another_input_size_and_four_bits_are_checked_without_values(tmp_path: Path) -> None:
    model = tiny_model_section(tmp_path / "parts")
    model["encoder"]["image_size"] = 42
    lora = {"train": {"lora": 1e-3}, "lora": {"rank": 4}}
    path = run_file(tmp_path, model, plain=lora, packed={**lora, "lora": {"rank": 4, "quantize": "nf4"}})
    report = checked(path)
    assert report.mistakes == []
    assert "lora " in report.trains["packed"]
    # of 21 tensors the 14 matrices of two layers lie in four bits, which are no parameters
    assert "language_model (frozen) 7 " in " ".join(report.trains["packed"].split())
    assert "language_model (frozen) 21 " in " ".join(report.trains["plain"].split())


def test_a_tower_that_is_trained_and_read_from_features_is_told(tmp_path: Path) -> None:
    model = tiny_model_section(tmp_path / "parts")
    data = {"features": str(tmp_path / "features")}
    path = run_file(
        tmp_path,
        model,
        one={"train": {"connector": 1e-3, "vision_tower.layers.1-": 1e-5}, "data": data},
        two={"train": {"lora": 1e-3}, "lora": {"targets": ["vision_tower"]}, "data": data},
        three={"train": {"connector": 1e-3, "language_model": 1e-5}, "data": data},
    )
    tower, target = checked(path).mistakes
    assert "the rule 'vision_tower.layers.1-' trains the vision tower, whose outputs are read" in tower
    assert "'vision_tower' means layers of the vision tower, whose outputs are read" in target


@pytest.mark.parametrize("kind", ["siglip_qwen2", "open_clip_llama"])
def test_shapes_are_those_of_the_model_that_is_trained(tmp_path: Path, kind: Any) -> None:
    path = run_file(tmp_path, tiny_model_section(tmp_path / "parts", kind), one={"train": {"connector": 1e-3}})
    config = load_config(path)
    loaded = build_model(config.model, dtype=DTYPE, seed=0)
    counts = {
        part: sum(parameter.numel() for parameter in module.parameters())
        for part, module in loaded.model.named_children()
    }
    [rows] = checked(path).trains.values()
    assert f"{counts['vision_tower']:,}" in rows
    assert f"{counts['language_model']:,}" in rows
    # a directory: the tensors in its files are compared by name and shape
    save_model(loaded, None, tmp_path / "saved", made_from={})
    assert checked(run_file(tmp_path, {"path": str(tmp_path / "saved")}, one={"train": {"connector": 1e-3}})).trains
    other = tiny_model_section(tmp_path / "other", kind) | {"connector": {"type": "linear"}}
    stage = {"train": {"connector": 1e-3}, "init_from": str(tmp_path / "saved")}
    assert "has another connector than the run file" in checked(run_file(tmp_path, other, one=stage)).mistakes[0]


def test_data_that_is_not_there_is_told(tmp_path: Path) -> None:
    model = tiny_model_section(tmp_path / "parts")
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "manifest.json").write_text("{")
    table = tmp_path / "table.csv"
    table.touch()
    absent = [tmp_path / "none", cut, table]
    mixes = [*([{"shards": str(shards)}] for shards in absent), [{"recipe": "no_such_recipe"}]]
    path = run_file(
        tmp_path,
        model,
        **{f"s{number}": {"train": {"connector": 1e-3}, "data": {"mix": mix}} for number, mix in enumerate(mixes)},
    )
    missing, broken, no_shards, recipe = checked(path).mistakes
    assert missing == f"{tmp_path / 'none'}: there is no such directory or tar; shards are made by `mmit data convert`"
    assert broken.startswith(f"{cut / 'manifest.json'}")
    assert no_shards == f"{table}: is no set of shards; make one with `mmit data convert {table} --out DIR`"
    assert "no_such_recipe" in recipe
    text = load_config(path, ["stages.s0.evaluate={mix: [{recipe: no_such_recipe}], text: nowhere}"])
    assert any(one.startswith("nowhere: there is no such directory") for one in check_run(text).mistakes)
    assert check_run(load_config(path), data=False).mistakes == []


def test_an_attention_and_kernels_that_cannot_run_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("mmit.models.kernels.find_spec", lambda _: None)
    capped = Gemma2Config(
        vocab_size=640, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    model = {
        "encoder": {"path": str(tiny_clip_dir(tmp_path / "clip"))},
        "language_model": {"path": described(tmp_path / "gemma", capped), "template": "vicuna"},
    }
    stage = {"train": {"connector": 1e-3}}
    path = run_file(
        tmp_path,
        model,
        one={**stage, "attention": "sdpa"},
        two={**stage, "attention": "flex_attention", "kernels": "liger"},
    )
    report = checked(path)
    assert report.mistakes == [
        "stages.one.attention: sdpa does not serve: Gemma2ForCausalLM caps its scores, which it would leave out; set "
        "it to auto",
        "stages.two.kernels: liger does not serve: the package liger-kernel is not installed (pip install "
        "'mmit[gpu]'); set it to auto",
    ]
    # another machine may train
    assert report.notes == [
        "stages.two.attention: flex_attention does not serve on this machine: it runs on GPUs only and the model is "
        "on cpu"
    ]


def test_what_the_machine_or_the_model_does_not_offer_is_told_and_refused_before_a_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    monkeypatch.setattr("mmit.train.sinks.find_spec", lambda _: None)
    (tmp_path / "file").touch()
    parts = tiny_model_section(tmp_path / "parts")  # 4 heads
    stage = {"train": {"connector": 1e-3}}
    path = run_file(tmp_path, parts, one={**stage, "parallel": {"sequence": 3}, "log": {"wandb": {"project": "p"}}})
    config = load_config(path, ["precision=fp16", "launch.cpu_ranks=2", f"output={tmp_path / 'file' / 'run'}"])
    report = check_run(config)
    ranks = (
        "stages.one.parallel.sequence: 3 does not divide the 2 ranks; set it to 1, or start a multiple of 3 ranks "
        "(--ranks, launch.cpu_ranks)"
    )
    assert report.mistakes == [
        f"output {tmp_path / 'file' / 'run'}: cannot be written: Not a directory; name another folder as 'output'",
        "log.wandb needs the package 'wandb': pip install 'mmit[wandb]'",
        "stages.one.parallel.sequence: LlamaForCausalLM cannot share a row: its 4 heads (4 of keys) cannot be dealt to "
        "3 ranks; set it to 1",
    ]
    # another machine may train
    assert report.notes == [
        "precision: DeepSpeed does not train in fp16 on this CPU (it lacks AVX512-FP16); set it to bf16 or fp32",
        ranks,
    ]
    with pytest.raises(ConfigError, match=r"^output .*/file/run: cannot be written: Not a directory; name another"):
        run_stages(config, [], stages=["one"], ranks=None, fresh=False)
    config = load_config(path, ["launch.cpu_ranks=2", f"output={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=f"^{re.escape(ranks)}$"):
        run_stages(config, [], stages=["one"], ranks=None, fresh=False)
    assert not (tmp_path / "run").exists()


def test_a_directory_that_no_stage_can_start_from_is_told(tmp_path: Path) -> None:
    model = tiny_model_section(tmp_path / "parts")
    loaded = build_model(ComposedModel.model_validate(model), dtype=DTYPE, seed=0)
    save_model(loaded, None, tmp_path / "saved", made_from={})
    starts = [str(tmp_path / "saved"), model["language_model"]["path"], model["encoder"]["path"]]
    stages = {f"s{number}": {"train": {"connector": 1e-3}, "init_from": start} for number, start in enumerate(starts)}
    found = checked(run_file(tmp_path, model, **stages)).mistakes
    assert len(found) == 2
    assert all(start in mistake for start, mistake in zip(starts[1:], found, strict=True))
    # the same shapes, and another function of them
    other = model | {"connector": {"type": "average_pool", "tokens": 4}}
    [mistake] = checked(run_file(tmp_path, other, s=stages["s0"])).mistakes
    assert "has another connector than the run file" in mistake
