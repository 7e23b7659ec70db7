"""What holds for all tests: none asks a hub; those that need a process group in their own process share one."""

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which is after this

import pytest
from ranks import free_port


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """The group of a single rank, one for the life of this process: DeepSpeed keeps what it made of the first."""
    import torch

    from mmit.train.engine import init_process_group

    with as_rank_0():
        init_process_group()
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_rank(process_group: None) -> Iterator[None]:
    """This process is the only rank of a run."""
    with as_rank_0():
        yield


@contextmanager
def as_rank_0() -> Generator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            patch.setenv(name, value)
        patch.setenv("MASTER_PORT", str(free_port()))
        yield
