"""docs/connectors.md: the connector of one's own runs as it stands there, and the numbers of the table are right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from factories import tiny_bert_tokenizer
from model_factories import tiny_model_section
from models_support import batch_of, sample
from pydantic import TypeAdapter

from mmit.config import ComposedModel, Connector, QFormerConnector
from mmit.models import build_model, load_model, save_model
from mmit.models.connectors import build_connector, check_connector, keeps_grid, reads_instruction

PAGE = (Path(__file__).parent.parent / "docs" / "connectors.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_a_connector_of_ones_own_takes_less_than_thirty_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    assert code.count("\n") < 30
    (tmp_path / "my_connectors.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    described = yaml.safe_load(blocks("yaml")[-1])
    check_connector(described["connector"], width_in=24, width_out=32, patches=16)
    section = ComposedModel.model_validate(tiny_model_section(tmp_path) | described)
    loaded = build_model(section, dtype=torch.float32, seed=0)
    assert loaded.spec.tokens_per_tile == 2  # of 4 patches, every third
    batch = batch_of(loaded, [[sample(loaded, text=range(40, 50), images=1, trained=3)]])
    save_model(loaded, None, tmp_path / "model", made_from={})
    with torch.no_grad():
        logits = loaded.model.logits(batch)
        assert torch.equal(load_model(tmp_path / "model", dtype=torch.float32).model.logits(batch), logits)


def test_the_sections_on_the_page_are_valid() -> None:
    for block in blocks("yaml"):
        section: dict[str, Any] = {"encoder": {"type": "transformers", "path": "x"}, "language_model": {"path": "x"}}
        ComposedModel.model_validate(section | yaml.safe_load(block))


@pytest.mark.parametrize(
    ("kind", "row"),
    [(kind, row) for kind, row in re.findall(r"^\| `(\w+)`[^|]*(\|[^|]*\|[^|]*\|[^|]*\|)", PAGE, flags=re.MULTILINE)],
)
def test_the_table_tells_parameters_and_grid(kind: str, row: str, tmp_path: Path) -> None:
    _, tokens, parameters, grid, _ = (cell.strip() for cell in row.split("|"))
    width = 1024
    if reads := parameters == "188.8 M":
        width = 1408
        tiny_bert_tokenizer(tmp_path)
        described: Any = QFormerConnector.model_validate(
            {
                "type": kind,
                "instruction": {"tokenizer": str(tmp_path), "vocabulary": 30523},
            }
        )
    else:
        described = TypeAdapter(Connector).validate_python({"type": kind})
    with torch.device("meta"):
        made: Any = build_connector(
            described, width_in=width, width_out=4096, patches=576, seed=0, dtype=torch.bfloat16
        )
    count = sum(parameter.numel() for parameter in made.parameters())
    assert f"{count / 1e6:.1f} M" == parameters
    assert grid == ("yes" if keeps_grid(made) else "no")
    assert made.tokens(576) == ({"P": 576, "P / factor²": 144}.get(tokens) or described.model_dump()["tokens"])
    assert reads_instruction(made) == reads
