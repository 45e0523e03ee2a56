"""What a run costs a device, from the manifest's costs and the rounds that were run.

FLOPs are multiply-accumulates (methods, section 0.1): trained parts 3 x forward, frozen parts 1 x forward. Two sums:

    train_macs_per_sample   one sample in each local epoch of each round: the papers' total, which does not grow with the data.
                            `with_cache` counts a frozen segment once, when it is frozen; `without_cache` in every epoch.
    device_macs             what a device really computed, on average over the devices: its examples, the rounds that it took
                            part in, and the frozen segments that it drew, as often as the plan's feature store runs them
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.simulation import Round, SimulationResult
from lamina.manifest import EngineName, Manifest


@dataclass(frozen=True)
class Costs:
    """Bytes are means over the devices; `planned_bytes` is the largest of the stages that train."""

    planned_bytes: int
    largest_macs_per_sample: int
    train_macs_per_sample_with_cache: int
    train_macs_per_sample_without_cache: int
    device_macs: float
    bytes_down: float
    bytes_up: float

    @property
    def bytes_moved(self) -> float:
        return self.bytes_down + self.bytes_up

    def as_row(self) -> dict[str, Any]:
        return asdict(self) | {"bytes_moved": self.bytes_moved}


def costs_of(result: SimulationResult, engine: EngineName) -> Costs:
    """Costs of a finished run; of no rounds, there are none."""
    manifest, epochs = result.manifest, result.manifest.plan.training.local_epochs
    stages = sorted({each.stage for each in result.rounds})
    moved = [result.bytes_of(device) for device in result.devices]
    active = sum(epochs * manifest.stages[each.stage].cost.flops_per_sample for each in result.rounds)
    prefix = sum(epochs * manifest.stages[each.stage].cost.prefix_flops_per_sample for each in result.rounds)
    return Costs(
        planned_bytes=max(manifest.stages[stage].cost.planned_bytes[engine] for stage in stages),
        largest_macs_per_sample=max(manifest.stages[stage].cost.flops_per_sample for stage in stages),
        train_macs_per_sample_with_cache=active + _prefix_macs(manifest, stages),
        train_macs_per_sample_without_cache=active + prefix,
        device_macs=sum(_device_macs(result, device) for device in result.devices) / len(result.devices),
        bytes_down=sum(down for down, _ in moved) / len(moved),
        bytes_up=sum(up for _, up in moved) / len(moved),
    )


def _device_macs(result: SimulationResult, device: str) -> float:
    """Of a device with all modalities; one with fewer computes less."""
    manifest, training = result.manifest, result.manifest.plan.training
    mine: Sequence[Round] = [each for each in result.rounds if device in each.cohort]
    macs = sum(training.local_epochs * manifest.stages[each.stage].cost.flops_per_sample for each in mine)
    passes = {"stage": training.features.views, "round": training.features.views, "none": training.local_epochs}
    known: set[tuple[str, ...]] = set()
    for each in mine:
        for chain in _chains(each.frozen[device]):
            depths = [chain[: depth + 1] for depth in range(len(chain))]
            new = [depth for depth in depths if training.features.keep != "stage" or depth not in known]
            known.update(depths)
            macs += passes[training.features.keep] * sum(manifest.segment_macs[depth[-1]] for depth in new)
    return result.examples[device] * macs


def _chains(frozen: Sequence[str]) -> list[tuple[str, ...]]:
    """Segments by modality, in order."""
    modalities = dict.fromkeys(name.partition(".")[0] for name in frozen)
    return [tuple(name for name in frozen if name.partition(".")[0] == modality) for modality in modalities]


def _prefix_macs(manifest: Manifest, stages: Sequence[int]) -> int:
    """Each segment that is frozen in one of these stages, once: what the stages before computed is on disk."""
    frozen = {name for stage in stages for name in manifest.plan.stages[stage].frozen}
    return sum(manifest.segment_macs[name] for name in frozen)
