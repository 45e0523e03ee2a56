"""Tensors that no engine can take are replaced by float32 ones, so that the segments behind them can be looked at all the same.

What was replaced is a fault: no export takes such a model.
"""

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace

import torch
from torch import Tensor, nn

from export.faults.faults import Fault, precision_advice
from export.models.adapters.common import segments_of
from export.models.copies import copied
from export.trunk import Trunk


def mended(module: nn.Module) -> nn.Module:
    """The module, or a copy whose floating-point tensors are float32 on the CPU; those without values are zeros."""
    if not any(_is_foreign(value) for _, value in _tensors(module)):
        return module
    copy: nn.Module = copied(module)
    known = {id(value): _as_float32(key, value) for key, value in _tensors(copy) if _is_foreign(value)}
    for part in copy.modules():
        for key, value in list(_tensors(part, recurse=False)):
            if id(value) in known:
                setattr(part, key, known[id(value)])
    return copy


def mended_trunk(trunk: Trunk) -> Trunk:
    """As `mended`, of a trunk's segments."""
    first, *between, last = mended(nn.ModuleList(segments_of(trunk))).children()
    return replace(trunk, stem=first, layers=tuple(between), norm=last)


def mending_faults(made: nn.Module | Trunk, modality: str, parts: Mapping[str, nn.Module]) -> Iterator[Fault]:
    """A fault for each mended tensor of a user's model: in the segment where an adapter has put it, or beside all segments."""
    told = set()
    for name, part in parts.items():
        for key, value in part.named_parameters():
            if isinstance(value, _Mended):
                told.add(value.key)
                reason, remedy = precision_advice(value.original) or ("", "")
                yield Fault(name, f"parameter {key!r} {reason}", remedy, f"parameter {value.key!r} {reason}; {remedy}")
    if isinstance(made, nn.Module):
        yield from _untold(made, modality, told)


class _Mended(nn.Parameter):
    """A parameter in the place of one that no engine can take. Each has a class of its own, because that is what a deep copy
    keeps: so it is found again in the segment where an adapter has put it."""

    key: str
    original: Tensor


def _as_float32(key: str, value: Tensor) -> Tensor:
    data = value.detach()
    data = torch.zeros(data.shape) if data.is_meta else data.to("cpu", torch.float32)
    if not isinstance(value, nn.Parameter):
        return data
    return type("Mended", (_Mended,), {"key": key, "original": value})(data, value.requires_grad)


def _is_foreign(value: Tensor) -> bool:
    return value.is_floating_point() and (value.dtype != torch.float32 or value.device.type != "cpu")


def _untold(module: nn.Module, modality: str, told: Set[str]) -> Iterator[Fault]:
    """Tensors that are in no segment, or are so no longer, such as a statistic; an export refuses them as well."""
    places = {key.rpartition(".")[0] for key in told}
    for key, value in _tensors(module):
        is_alone = isinstance(value, nn.Parameter) or key.rpartition(".")[0] not in places
        if _is_foreign(value) and key not in told and is_alone:
            yield Fault(
                f"({modality}: {key})",
                f"{key!r} is {value.dtype} on {value.device}",
                "export reads float32 on the CPU: call model.float().cpu(), or remove what is not used",
                f"{key!r} is {value.dtype} on {value.device}; export reads float32 on the CPU: call model.float().cpu(), or "
                "remove what is not used",
            )


def _tensors(module: nn.Module, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=recurse, remove_duplicate=recurse)
    yield from module.named_buffers(recurse=recurse, remove_duplicate=recurse)
