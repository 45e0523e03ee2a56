"""What a run costs a device: planned memory, FLOPs, and bytes moved.

FLOPs are the multiply-accumulates that a device computes for one of its examples in a run in which it takes part in every
round; evaluations are left out. They are counted by the papers' rule, backward twice the forward pass, and then as things are:

    a step     3 x forward of the active segments, of both views where two are compared; once more where micro-batches are
               embedded before they are differentiated (`lamina.plans.plan.Plan.embeds_first`); 1 x forward of what runs in
               copies of the model (`export.graphs.stage_module.references_of`)
    features   each frozen segment once for each version of the example that is taken, and again when it is no longer stored
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.simulate.simulation import SimulationResult
from edge_client import versions
from export.graphs.stage_module import references_of
from export.programs import stage_terms
from lamina.bundles.manifest import EngineName
from lamina.plans.depth import drawn_prefix
from lamina.plans.plan import Plan, Stage

A_DEVICE = "device-0"
"""Whose draws of frozen layers are counted."""


@dataclass(frozen=True)
class Costs:
    """Bytes are means over the devices; `planned_bytes` is the largest of the stages that train."""

    planned_bytes: int
    macs_per_sample: int
    bytes_down: float
    bytes_up: float

    @property
    def bytes_moved(self) -> float:
        return self.bytes_down + self.bytes_up

    def as_row(self) -> dict[str, Any]:
        return asdict(self) | {"bytes_moved": self.bytes_moved}


def costs_of(result: SimulationResult, engine: EngineName) -> Costs:
    """Costs of a finished run; of no rounds, there are none."""
    manifest, stages = result.manifest, [each.stage for each in result.rounds]
    moved = [result.bytes_of(device) for device in result.devices]
    return Costs(
        planned_bytes=max(manifest.stages[stage].cost.planned_bytes[engine] for stage in stages),
        macs_per_sample=macs_per_sample(manifest.plan, manifest.segment_macs, stages),
        bytes_down=sum(down for down, _ in moved) / len(moved),
        bytes_up=sum(up for _, up in moved) / len(moved),
    )


def macs_per_sample(plan: Plan, segment_macs: Mapping[str, int], stage_by_round: Sequence[int]) -> int:
    """`segment_macs` are those of one forward pass of each segment, `stage_by_round` the rounds that were run."""
    total, known = 0, set[tuple[int, tuple[str, ...]]]()
    epochs, store = plan.training.local_epochs, plan.training.features
    for place, index in enumerate(stage_by_round):
        stage, number = plan.stages[index], stage_by_round[:place].count(index)
        total += epochs * step_macs(plan, stage, segment_macs)
        for modality in plan.model.modalities:
            chain = _frozen(plan, stage, modality, number)
            count = store.views if modality in plan.training.augmentation else 1
            for taken in _taken(plan, number, count):
                for depth, name in enumerate(chain):
                    made = (taken, tuple(chain[: depth + 1]))
                    if store.keep != "stage" or made not in known:
                        total += segment_macs[name]
                        known.add(made)
    return total


def step_macs(plan: Plan, stage: Stage, segment_macs: Mapping[str, int]) -> int:
    """Of one example in one epoch, features apart."""
    active = plan.passes_of_a_step * sum(segment_macs[name] for name in stage.active)
    copies = references_of(plan.model, stage, stage_terms(plan, stage), is_judged=False)
    copied = sum(segment_macs[name] for names in copies.values() for name in names)
    return (2 if _compares_views(plan) else 1) * (active + copied)


def _taken(plan: Plan, number: int, count: int) -> Sequence[int]:
    """The versions of an example whose features a round needs, of `count`; each time, where they are not stored."""
    epochs, in_pairs = versions.epochs_of(number, plan.training.local_epochs), _compares_views(plan)
    if plan.training.features.keep != "none":
        return sorted(versions.of_epochs(epochs, count, in_pairs))
    return [taken for epoch in epochs for taken in versions.of_epoch(epoch, count, in_pairs)]


def _frozen(plan: Plan, stage: Stage, modality: str, number: int) -> list[str]:
    chain = stage.frozen_chain(plan.model, modality)
    dropout = plan.training.depth_dropout
    if dropout is None:
        return chain
    layers = len([name for name in stage.active if name.startswith(f"{modality}.layers.")])
    return drawn_prefix(chain, layers, dropout, plan.seed, stage.index, number, A_DEVICE)


def _compares_views(plan: Plan) -> bool:
    return plan.model.objective.kind == "self_supervised"
