"""Equal layers are traced once: two modules that look alike and compute the same share their programs."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from export.graphs.trace import Arrays

Look = tuple[object, ...]


def look(module: nn.Module, *facts: object) -> Look:
    """What equal modules have in common: the tree of their parts as torch prints it, and their parameters' names and shapes,
    and which of them are trained."""
    shapes = tuple((name, tuple(value.shape), value.requires_grad) for name, value in module.named_parameters())
    return (type(module), repr(module), shapes, *facts)


@torch.no_grad()
def computes_the_same(one: nn.Module, other: nn.Module, inputs: Arrays) -> bool:
    """Whether both give the same bits for these inputs with the same weights, which are random.

    What torch prints of a module does not show everything: its code may take a number that only the instance has.
    """
    generator = torch.Generator().manual_seed(2)
    weights = {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in one.named_parameters()}
    left, right = (_flat(functional_call(module, weights, inputs)) for module in (one, other))
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def _flat(given: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [given] if isinstance(given, Tensor) else list(given)
