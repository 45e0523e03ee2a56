"""The rewrites of a whole model, proved on features that really flow through it."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from export.inputs import example_inputs, raw_input
from export.rewrites import fold_batch_norm, prove_rewrites, untie
from export.trunk import Trunk
from lamina.manifest import Rewrite
from lamina.model import ModelDescription
from lamina.segments import norm, prefix_chain, projection


def engine_safe(trunk: Trunk, modality: str) -> Trunk:
    """The trunk with batch norm folded and tied parameters separated; what was changed is in its `rewrites`."""
    names = [f"{modality}.stem", *(f"{modality}.layers.{index}" for index in range(len(trunk.layers))), f"{modality}.norm"]
    parts, rewrites = untie(dict(zip(names, (trunk.stem, *trunk.layers, trunk.norm), strict=True)))
    for name, part in parts.items():
        parts[name], folded = fold_batch_norm(part, name)
        rewrites += folded
    stem, *layers, last = parts.values()
    return Trunk(
        stem=stem,
        layers=tuple(layers),
        norm=last,
        pool=trunk.pool,
        input=trunk.input,
        projection=trunk.projection,
        notes=(*trunk.notes, *_dropouts(modality, parts.values())),
        rewrites=(*trunk.rewrites, *rewrites),
    )


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
