"""Liger's kernels are taken where they serve, with the reason where they do not, and never where they change a model.

The package stands for itself in a folder of the test, computing what torch computes (or not): its own kernels need a
GPU. In Triton's interpreter they gave the states and gradients of nine families
up to fp32 rounding (liger-kernel 0.8.5).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from mmit.errors import ConfigError
from mmit.models import kernels
from mmit.models.kernels import use_kernels, why_no_liger
from mmit.models.placement import WHOLE

PATCHES = """
import types
from transformers.models.llama import modeling_llama

def forward(self, states):
    return modeling_llama.torch.nn.functional.rms_norm(states, self.weight.shape, self.weight, 1e-6){much}

def llama(model, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=True):
    assert not cross_entropy and not fused_linear_cross_entropy
    modeling_llama.LlamaRMSNorm = type("LigerRMSNorm", (), {{}})
    modeling_llama.apply_rotary_pos_emb = lambda *given, rotary=modeling_llama.apply_rotary_pos_emb: rotary(*given)
    for module in [model.model.norm, *(layer.input_layernorm for layer in model.model.layers)]:
        module.forward = types.MethodType(forward, module)
    {then}

MODEL_TYPE_TO_APPLY_LIGER_FN = {{"llama": llama}}

def _apply_liger_kernel_to_instance(model, **options):
    MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](model=model, **options)
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Install]:
    """Make a package ``liger_kernel``, and take its kernels on the device that there is."""
    names = dict(vars(modeling_llama))

    def make(much: str = "", then: str = "pass") -> None:
        (tmp_path / "liger_kernel" / "transformers").mkdir(parents=True)
        (tmp_path / "liger_kernel" / "__init__.py").touch()
        (tmp_path / "liger_kernel" / "transformers" / "__init__.py").touch()
        file = tmp_path / "liger_kernel" / "transformers" / "monkey_patch.py"
        file.write_text(PATCHES.format(much=much, then=then))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(kernels, "RUNS_ON", "cpu")

    yield make
    vars(modeling_llama).update(names)
    for name in [name for name in sys.modules if name.split(".")[0] == "liger_kernel"]:
        del sys.modules[name]


def llama() -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2)).eval()


def test_liger_is_taken_by_itself_where_it_knows_the_model_and_names_stay(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install()
    model, plain = llama(), modeling_llama.LlamaRMSNorm
    ids, names = torch.arange(20)[None], list(model.state_dict())
    before, rotary = model(ids).logits, modeling_llama.apply_rotary_pos_emb
    with caplog.at_level(logging.INFO, logger="mmit"):
        assert use_kernels(model, "auto", WHOLE) == "liger"
    assert caplog.messages == ["kernels of LlamaForCausalLM: liger"]
    assert "forward" in vars(model.model.norm)
    # the same sums by another function, in fp32
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-5)
    assert list(model.state_dict()) == names
    assert modeling_llama.LlamaRMSNorm is plain  # models made later are torch's
    assert modeling_llama.apply_rotary_pos_emb is not rotary


@pytest.mark.parametrize(
    ("much", "then", "reason"),
    [
        (" * 1.01", "pass", "give other states (by 0."),
        ("", "model.model.no_such_layer", "fail here ('LlamaModel' object has no attribute 'no_such_layer')"),
    ],
)
def test_kernels_that_fail_or_compute_another_model_are_taken_out_again(
    install: Install, caplog: pytest.LogCaptureFixture, much: str, then: str, reason: str
) -> None:
    install(much, then)
    model, ids = llama(), torch.arange(20)[None]
    before, rotary = model(ids).logits, modeling_llama.apply_rotary_pos_emb
    with caplog.at_level(logging.INFO, logger="mmit"):
        assert use_kernels(model, "auto", WHOLE) == "torch"
    assert f"kernels of LlamaForCausalLM: torch (Liger's kernels {reason}" in caplog.text
    assert torch.equal(model(ids).logits, before)
    assert modeling_llama.apply_rotary_pos_emb is rotary
    with pytest.raises(ConfigError, match=r"^kernels: liger does not serve here: .*; set it to auto$"):
        use_kernels(model, "liger", WHOLE)


def test_what_cannot_run_is_refused_with_the_remedy_and_left_out_by_itself(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    assert use_kernels(model, "auto", WHOLE) == use_kernels(model, "torch", WHOLE) == "torch"
    with pytest.raises(ConfigError, match=r"kernels: liger .* run on GPUs only and the model is on cpu; set it to"):
        use_kernels(model, "liger", WHOLE)
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    monkeypatch.setattr(kernels, "RUNS_ON", "cpu")
    with pytest.raises(ConfigError, match=r"liger-kernel is not installed \(pip install .mmit\[gpu\].\); set"):
        use_kernels(model, "liger", WHOLE)
    monkeypatch.undo()
    install()
    bloom = BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=16, n_layer=1, n_head=2))
    assert why_no_liger(bloom) == "Liger has no kernels for the family 'bloom'"
    with pytest.raises(ConfigError, match="torch compiles the layers; set it to auto"):
        use_kernels(model, "liger", WHOLE, is_compiled=True)
    assert use_kernels(model, "auto", WHOLE, is_compiled=True) == "torch"
    assert use_kernels(model, "torch", WHOLE) == "torch"
    assert "forward" not in vars(model.model.norm)
