"""The rewrites of a whole model, proved on features that really flow through it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from export.faults.faults import fault_of, tie_faults
from export.inputs import example_inputs, random_input, raw_input
from export.models.adapters.gated import Gated
from export.models.copies import copied
from export.ops.rewrites import fold_batch_norm, prove_rewrites
from export.trunk import Trunk
from lamina.bundles.manifest import Rewrite
from lamina.plans.model import ModelDescription
from lamina.plans.segments import layer, norm, prefix_chain, projection, stem


def named_parts(modality: str, trunk: Trunk) -> dict[str, nn.Module]:
    """Stem, layers and norm by the names of their segments."""
    layers = {layer(modality, index): module for index, module in enumerate(trunk.layers)}
    return {stem(modality): trunk.stem, **layers, norm(modality): trunk.norm}


def engine_safe(trunk: Trunk, modality: str) -> Trunk:
    """The trunk with batch norm folded and inputs copied where a layer changes its own; its `rewrites` say where.

    What cannot be made so is in its `faults`, as are segments that share a parameter.
    """
    parts = named_parts(modality, trunk)
    own = {} if trunk.projection is None else {projection(modality): trunk.projection}
    faults, rewrites = [*trunk.faults, *tie_faults(parts | own)], [*trunk.rewrites]
    for name, part in parts.items():
        try:
            parts[name], folded = fold_batch_norm(part, name)
            rewrites += folded
        except Exception as error:  # a batch norm of the user's own may raise anything
            parts[name] = copied(part).eval()
            faults.append(fault_of(name, error))
    rewrites += _copy_inputs(parts, random_input(trunk.input))
    first, *layers, last = parts.values()
    return replace(
        trunk,
        stem=first,
        layers=tuple(layers),
        norm=last,
        notes=(*trunk.notes, *_dropouts(modality, parts.values())),
        rewrites=tuple(rewrites),
        faults=tuple(faults),
    )


@torch.no_grad()
def _copy_inputs(parts: Mapping[str, nn.Module], x: Tensor) -> Iterator[Rewrite]:
    """Lets each part that changes its input in place change a copy: the input is also the gradient's, the cache's and the
    other view's. Nothing is said of a part that fails, or of those behind it."""
    for name, part in parts.items():
        taken = x.clone()
        try:
            y = part(taken)
        except Exception:  # `export.faults.faults` has the words
            return
        if taken._version:  # torch counts the changes of each tensor
            (part.layer if isinstance(part, Gated) else part).register_forward_pre_hook(_with_copies)
            y = part(x)
            yield Rewrite(where=name, kind="input copied", count=1, largest_difference=0.0, note="it is changed in place")
        if not isinstance(y, Tensor):
            return
        x = y


def _with_copies(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in given)


def _dropouts(modality: str, parts: Iterable[nn.Module]) -> list[str]:
    rates = [module.p for part in parts for module in part.modules() if isinstance(module, _DropoutNd) and module.p]
    if not rates:
        return []
    return [f"{modality}: {len(rates)} dropouts of up to {max(rates):g} are off; features of a frozen prefix must not vary"]


@torch.no_grad()
def prove_model(
    segments: Mapping[str, nn.Module], pools: Mapping[str, nn.Module], description: ModelDescription
) -> list[Rewrite]:
    """What tracing replaces in each segment and pool, compared with the original on two random samples.

    Raises ParityError for a replacement that computes something else.
    """
    found: list[Rewrite] = []
    for encoder in description.encoders:
        modality = encoder.modality
        (x,) = example_inputs(description, (raw_input(encoder),), 2)
        chain = {name: segments[name] for name in (*prefix_chain(description, modality), norm(modality))}
        chain |= {f"{modality}.pool": pools[modality], projection(modality): segments[projection(modality)]}
        for name, module in chain.items():
            found += prove_rewrites(module, (x,), name)
            x = module(x)
    return found


def by_modality(rewrites: Iterable[Rewrite]) -> Sequence[Rewrite]:
    """Equal rewrites of a modality's segments as one: the counts add up, the largest difference counts."""
    merged: dict[tuple[str, str, str], Rewrite] = {}
    for each in rewrites:
        where = each.where.split(".", maxsplit=1)[0]
        key = (where, each.kind, each.note)
        known = merged.get(key)
        merged[key] = Rewrite(
            where=where,
            kind=each.kind,
            count=each.count + (known.count if known else 0),
            largest_difference=max(each.largest_difference, known.largest_difference if known else 0.0),
            note=each.note,
        )
    return tuple(merged.values())
