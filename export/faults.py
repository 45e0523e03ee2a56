"""A user's model with what is wrong in it, segment by segment, for `lamina doctor`: an export refuses it at the first fault.

Tensors that no engine can take are replaced by float32 ones, so that the segments behind them can be looked at all the same.
"""

from collections.abc import Iterator, Mapping, Set
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from export.adapters import adapt
from export.adapters.common import segments_of
from export.cut import check_parameter
from export.models import adapt_made
from export.rewrites import fold_batch_norm, untie
from export.trunk import Trunk
from lamina.errors import CutError
from lamina.segments import layer, norm, stem

Faults = dict[str, Exception]
"""Segment -> why an export refuses it. A key that is no segment of the plan names something else of the user's module."""


def named_parts(modality: str, trunk: Trunk) -> dict[str, nn.Module]:
    """Stem, layers and norm by the names of their segments."""
    layers = {layer(modality, index): module for index, module in enumerate(trunk.layers)}
    return {stem(modality): trunk.stem, **layers, norm(modality): trunk.norm}


def adapt_faulty(made: object, modality: str, factory: str, options: Mapping[str, Any], faults: Faults) -> Trunk:
    """As `adapt_made`; what one segment is refused for goes into `faults` under its name, and the others are read.

    Still raises CutError for what is no fault of one segment: an attribute or a modality that is missing, a library's model
    that its adapter cannot run.
    """
    module = made.get(modality) if isinstance(made, Mapping) else made
    if isinstance(module, Trunk):
        first, *between, last = mended(nn.ModuleList(segments_of(module))).children()
        module = replace(module, stem=first, layers=tuple(between), norm=last)
    elif not isinstance(module, nn.Module):
        return adapt_made(made, modality, factory, options)
    trunk = adapt(mended(module) if isinstance(module, nn.Module) else module, **options)
    parts = named_parts(modality, trunk)
    told = set()
    for name, part in (*parts.items(), (norm(modality), trunk.pool)):
        for key, value in part.named_parameters():
            if isinstance(value, _Mended):
                told.add(value.key)
                faults.setdefault(name, _precision_fault(key, value.original))
    if isinstance(module, nn.Module):
        faults |= {f"({modality}: {key})": error for key, error in _untold(module, told)}
    parts, _ = untie(parts)
    for name, part in parts.items():
        try:
            parts[name], _ = fold_batch_norm(part, name)
        except Exception as error:  # a batch norm of the user's own may raise anything
            faults.setdefault(name, error)
    first, *between, last = parts.values()
    return replace(trunk, stem=first, layers=tuple(between), norm=last)


class _Mended(nn.Parameter):
    """A parameter in the place of one that no engine can take. Each has a class of its own, because that is what a deep copy
    keeps: so it is found again in the segment where an adapter has put it."""

    key: str
    original: Tensor


def mended(module: nn.Module) -> nn.Module:
    """The module, or a copy whose floating-point tensors are float32 on the CPU; those without values are zeros."""
    if not any(_is_foreign(value) for _, value in _tensors(module)):
        return module
    copy = deepcopy(module)
    known = {id(value): _as_float32(key, value) for key, value in _tensors(copy) if _is_foreign(value)}
    for part in copy.modules():
        for key, value in list(_tensors(part, recurse=False)):
            if id(value) in known:
                setattr(part, key, known[id(value)])
    return copy


def _as_float32(key: str, value: Tensor) -> Tensor:
    data = value.detach()
    data = torch.zeros(data.shape) if data.is_meta else data.to("cpu", torch.float32)
    if not isinstance(value, nn.Parameter):
        return data
    return type("Mended", (_Mended,), {"key": key, "original": value})(data, value.requires_grad)


def _is_foreign(value: Tensor) -> bool:
    return value.is_floating_point() and (value.dtype != torch.float32 or value.device.type != "cpu")


def _precision_fault(key: str, parameter: Tensor) -> CutError:
    try:
        check_parameter(key, parameter)
    except CutError as error:
        return error
    raise AssertionError(f"{key} is {parameter.dtype} on {parameter.device}, and nothing is wrong with it")


def _untold(module: nn.Module, told: Set[str]) -> list[tuple[str, CutError]]:
    """Tensors that are in no segment, or are so no longer, such as a statistic; an export refuses them as well."""
    places = {key.rpartition(".")[0] for key in told}
    advice = "export reads float32 on the CPU: call model.float().cpu(), or remove what is not used"
    return [
        (key, CutError(f"{key!r} is {value.dtype} on {value.device}; {advice}"))
        for key, value in _tensors(module)
        if _is_foreign(value) and key not in told and (isinstance(value, nn.Parameter) or key.rpartition(".")[0] not in places)
    ]


def _tensors(module: nn.Module, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=recurse, remove_duplicate=recurse)
    yield from module.named_buffers(recurse=recurse, remove_duplicate=recurse)
