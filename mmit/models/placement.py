"""Where the parameters of a model live: whole in every process, in pieces over the ranks, or nowhere at all.

Training under ZeRO-3 puts its own placement in force around the making of a model; everything that makes, fills or
runs modules outside the training engine asks the one in force. Checking a run file needs shapes only: ``SHAPES``.
Elsewhere it is ``WHOLE``, which does nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights


class Placement(Protocol):
    """How parameters are kept, and how they are made whole for a moment. Every call is collective over the ranks."""

    holds: bool
    """Whether there are values at all; where not, weights are not read and nothing can be run."""
    writes: bool
    """Whether this process fills the weights; others receive what it wrote."""

    def born(self) -> AbstractContextManager[object]:
        """While in force, a language model that transformers makes or reads is placed parameter by parameter."""
        ...

    def place(self, module: nn.Module) -> None:
        """Place the parameters of a module that was made whole."""
        ...

    def whole(self, parameters: Sequence[Tensor], *, write: bool = False) -> AbstractContextManager[object]:
        """While in force, ``parameters`` are whole; with ``write``, what the writing process put there is kept."""
        ...

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of the whole parameter."""
        ...

    def told(self, message: str) -> str:
        """What the writing process says, in every process."""
        ...


class Whole:
    """Every process holds every parameter."""

    holds = True
    writes = True

    def born(self) -> AbstractContextManager[object]:
        """Nothing to do."""
        return nullcontext()

    def place(self, module: nn.Module) -> None:
        """Nothing to do."""

    def whole(self, parameters: Sequence[Tensor], *, write: bool = False) -> AbstractContextManager[object]:
        """They are."""
        del parameters, write
        return nullcontext()

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The tensor's own."""
        return tuple(tensor.shape)

    def told(self, message: str) -> str:
        """What this process says."""
        return message


class Shapes(Whole):
    """No process holds any parameter: modules are made on the meta device, so that they can be checked at once."""

    holds = False

    def born(self) -> AbstractContextManager[object]:
        """Make modules on the meta device."""
        stack = ExitStack()
        for context in (torch.device("meta"), no_init_weights(), meta_device_safe_creation_ops()):
            stack.enter_context(context)
        return stack

    def place(self, module: nn.Module) -> None:
        """Give up the values."""
        module.to("meta")


WHOLE: Placement = Whole()
"""Every process holds every parameter."""

SHAPES: Placement = Shapes()
"""No process holds any."""

_in_force: ContextVar[Placement] = ContextVar("placement", default=WHOLE)


def placement() -> Placement:
    """The placement in force."""
    return _in_force.get()


@contextmanager
def placed(by: Placement) -> Generator[None]:
    """Put a placement in force: models made and read inside are kept its way."""
    token = _in_force.set(by)
    try:
        yield
    finally:
        _in_force.reset(token)


@contextmanager
def runnable(module: nn.Module, kept: Placement) -> Generator[None]:
    """While in force, ``module`` can be run outside the engine: the parameters of one submodule at a time are whole.

    Those of its leaves are too, since some modules (Mamba's mixer) use a child's weight without calling the child.
    """
    if isinstance(kept, Whole):
        yield
        return
    gathered: dict[nn.Module, ExitStack] = {}
    held: set[int] = set()

    def gather(child: nn.Module, *_: object) -> None:
        own = [parameter for parameter in _used_by(child) if id(parameter) not in held]
        held.update(id(parameter) for parameter in own)
        gathered[child] = stack = ExitStack()
        stack.enter_context(kept.whole(own))
        stack.callback(held.difference_update, [id(parameter) for parameter in own])

    def release(child: nn.Module, *_: object) -> None:
        gathered.pop(child).close()

    with ExitStack() as hooks:
        for child in module.modules():
            hooks.callback(child.register_forward_pre_hook(gather, prepend=True).remove)
            hooks.callback(child.register_forward_hook(release).remove)
        yield


def take_whole(modules: Sequence[nn.Module], kept: Placement) -> None:
    """Give modules whole parameters in every process in place of placed ones; a shared parameter stays shared."""
    if isinstance(kept, Whole):
        return
    copies: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in copies:
                with kept.whole([parameter]):
                    copies[id(parameter)] = nn.Parameter(parameter.detach().clone())
            module.register_parameter(name, copies[id(parameter)])


def _used_by(module: nn.Module) -> Iterator[nn.Parameter]:
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not any(child.children()):
            yield from child.parameters()
