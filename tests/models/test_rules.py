"""Train rules: what they match, who wins, what is never trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mmit.errors import ConfigError
from mmit.models import LoadedModel

Build = Callable[..., LoadedModel]


def trained(loaded: LoadedModel) -> set[str]:
    return {name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}


def test_part_names_stand_for_all_their_parameters(build: Build) -> None:
    loaded = build()
    (group,) = loaded.model.train_only({"connector": 1e-3})
    assert (group.pattern, group.lr) == ("connector", 1e-3)
    layers = [f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    assert sorted(group.names) == sorted(layers)
    assert trained(loaded) == set(layers)


def test_later_rules_win_and_zero_freezes(build: Build) -> None:
    loaded = build()
    first, second = loaded.model.train_only(
        {"language_model": 1e-5, r"layers\.1\.": 2e-5, "embed_tokens|lm_head": 0.0, r"layers\.0\..*norm": 0}
    )
    assert (first.lr, second.lr) == (1e-5, 2e-5)
    assert {"language_model.model.norm.weight", "language_model.model.layers.0.mlp.up_proj.weight"} <= set(first.names)
    assert all(".layers.1." in name for name in second.names)
    assert not any("embed_tokens" in name or "lm_head" in name for name in trained(loaded))
    assert trained(loaded) == {*first.names, *second.names}


def test_a_second_call_replaces_the_first(build: Build) -> None:
    loaded = build()
    loaded.model.train_only({"language_model": 1e-5})
    loaded.model.train_only({"connector": 1e-3})
    assert all(name.startswith("multi_modal_projector.") for name in trained(loaded))


def test_a_tied_table_is_trained_once(build: Build) -> None:
    loaded = build("siglip_qwen2")
    (group,) = loaded.model.train_only({"language_model": 1e-5})
    assert "language_model.model.embed_tokens.weight" in group.names
    assert not any("lm_head" in name for name in group.names)


def test_layers_behind_the_one_that_is_read_are_never_trained(loaded: LoadedModel) -> None:
    """Three layers, read at -2: the third and the final norm have no influence, an optimizer would only decay them."""
    (group,) = loaded.model.train_only({"vision_tower": 1e-6})
    assert any("layers.1." in name or "resblocks.1." in name for name in group.names)
    assert not any("layers.2." in name or "resblocks.2." in name for name in group.names)
    assert not any("post" in name or "head" in name for name in group.names)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"conector": 1e-3}, "the rule 'conector' matches no parameter"),
        ({"connector": 1e-3, r"layers\.99\.": 0.0}, r"the rule 'layers\\.99\\.' matches no parameter"),
        ({r"vision_tower\..*layers\.2\.": 1e-6}, r"do nothing, such as those behind model\.encoder\.layer"),
    ],
)
def test_a_rule_without_effect_is_an_error(build: Build, rules: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build().model.train_only(rules)
