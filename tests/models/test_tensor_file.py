"""A file that is filled tensor by tensor is the library's, byte for byte."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmit.models.tensor_file import TensorFile, outlined, write_tensors

TENSORS = {
    "b.weight": torch.randn(5, 3),
    "a.weight": torch.randn(2, 2, 2),
    "half": torch.randn(7).to(torch.bfloat16),
    "small": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "count": torch.tensor(12),
    "flags": torch.tensor([True, False]),
    "größe": torch.randn(1).double(),
    "sixteen": torch.randn(3).half(),
    "none": torch.empty(0),
    "int": torch.tensor([4], dtype=torch.int32),
}


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_the_bytes_are_those_of_the_library(tmp_path: Path, metadata: dict[str, str]) -> None:
    save_file(TENSORS, tmp_path / "theirs", metadata=metadata or None)
    write_tensors(tmp_path / "ours", TENSORS, metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_may_come_in_any_order_and_in_stretches(tmp_path: Path) -> None:
    values = {"first": torch.arange(10.0), "second": torch.arange(6.0).view(2, 3).t()}
    file = TensorFile(tmp_path / "file", {name: outlined(tensor) for name, tensor in values.items()}, metadata={})
    file.put("second", values["second"])
    file.put("first", values["first"][4:], start=4)
    with pytest.raises(AssertionError, match="not all of \\['first'\\] was written"):
        file.close()
    file.put("first", values["first"][:4])
    file.close()
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], values[name]) for name in values)
