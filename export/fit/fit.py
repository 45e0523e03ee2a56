"""Settings with which a plan fits a device: micro-batch, layers per stage, stored features, precision of the prefix.

What costs nothing in accuracy or speed is tried first: the plan's own layers per stage, float32 features and prefix, the
largest micro-batch. Only when that does not fit, the next smaller is looked at.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Literal, get_args

from export.fit.needs import MIB, StageNeeds, stage_needs
from lamina.bundles.manifest import EngineName, Precision
from lamina.errors import ConfigError
from lamina.plans.plan import Plan
from lamina.plans.strategies import make_stages

ENCODINGS: tuple[Literal["fp32", "fp16", "int8"], ...] = ("fp32", "fp16", "int8")
_BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0}
_SCALE_BYTES = 4  # one for each token


@dataclass(frozen=True)
class Base:
    """Peaks of the device's processes before any model, in bytes: measured on the machine where `fit` runs."""

    supervisor_bytes: int
    talk_bytes: int
    train_bytes: int


@dataclass(frozen=True)
class Fit:
    """A plan that fits, by prediction. `peak_bytes` is that of the whole device: supervisor and the larger process.

    `stage` is the one that needs most. `stored_share` of the examples have their features on disk.
    """

    plan: Plan
    layers_per_stage: int
    peak_bytes: int
    train_bytes: int
    fill_bytes: int
    disk_bytes: int
    stored_share: float
    stage: int


def fits(
    plan: Plan,
    engine: EngineName,
    base: Base,
    memory_bytes: int,
    disk_bytes: int | None = None,
    examples: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Iterator[Fit]:
    """Every choice that fits by prediction, the best first. Raises ConfigError if there is none: it names the smallest budget.

    `examples` is the number of examples on a device, for the disk budget.
    """
    smallest: Fit | None = None
    found = False
    traced: dict[tuple[int, bool], list[StageNeeds]] = {}
    for layers in _layer_counts(plan):
        staged = _with_layers(plan, layers)
        for micro in _micro_batches(plan):
            # One trace serves all micro-batches; where samples are compared, a step of one program and one of three are two.
            is_split = plan.model.objective.kind != "supervised" and micro < plan.training.batch_size
            if (layers, is_split) not in traced:
                traced[layers, is_split] = _trace(staged, is_split, on_progress)
            choice = _choose(staged, layers, micro, traced[layers, is_split], engine, base, memory_bytes, disk_bytes, examples)
            if choice.peak_bytes <= memory_bytes:
                found = True
                yield choice
            if smallest is None or choice.peak_bytes < smallest.peak_bytes:
                smallest = choice
    assert smallest is not None
    if not found:
        smaller_batch = " or batch_size" if _takes_whole_batches(plan) else ""
        raise ConfigError(
            f"{memory_bytes / MIB:.0f} MiB are too few for {plan.model.name!r} on {engine}: the smallest that would do is "
            f"about {ceil(smallest.peak_bytes / MIB)} MiB, with micro-batch {smallest.plan.training.micro_batch} and "
            f"{smallest.layers_per_stage or 'the planned'} layers per stage (of these, {base.train_bytes / MIB:.0f} MiB are "
            f"the process before any model). Another engine, SGD instead of AdamW, a smaller model{smaller_batch} needs less"
        )


def _choose(
    plan: Plan,
    layers: int,
    micro: int,
    needs: list[StageNeeds],
    engine: EngineName,
    base: Base,
    memory_bytes: int,
    disk_bytes: int | None,
    examples: int,
) -> Fit:
    train = [each.train_bytes(engine, micro, plan.training.optimizer, base.train_bytes) for each in needs]
    fills: dict[Precision, int] = {
        precision: max(each.fill_bytes(engine, micro, precision, base.train_bytes) for each in needs)
        for precision in get_args(Precision)
    }
    precision = plan.training.prefix_precision
    if base.supervisor_bytes + fills[precision] > memory_bytes:
        precision = min(fills, key=lambda each: fills[each])
    largest = max(range(len(needs)), key=lambda index: train[index])
    if plan.training.features.keep == "none" and fills[precision]:
        # The prefix runs for every batch, in the process that trains.
        train = [each + fills[precision] - base.train_bytes for each in train]
    encoding, share, stored = _features(plan, disk_bytes, examples)
    features = plan.training.features.model_copy(update={"encoding": encoding})
    training = plan.training.model_copy(update={"micro_batch": micro, "prefix_precision": precision, "features": features})
    return Fit(
        plan=plan.model_copy(update={"training": training}),
        layers_per_stage=layers,
        peak_bytes=base.supervisor_bytes + max(base.talk_bytes, train[largest], fills[precision]),
        train_bytes=train[largest],
        fill_bytes=fills[precision],
        disk_bytes=stored,
        stored_share=share,
        stage=needs[largest].stage.index,
    )


def _features(plan: Plan, disk_bytes: int | None, examples: int) -> tuple[Literal["fp32", "fp16", "int8"], float, int]:
    """Encoding, share of the examples that is stored, and bytes on disk: the plan's own encoding, or the first that fits."""
    own = plan.training.features.encoding
    chains = [encoder for encoder in plan.model.encoders if any(stage.frozen for stage in plan.stages)]

    def needed(encoding: str) -> int:
        rows = [
            examples * max(_row_bytes(encoder.feature_shape(d), encoding) for d in range(encoder.layers)) for encoder in chains
        ]
        # While one file is extended by a layer, its old and its new form exist.
        return int(sum(rows) * plan.training.features.views + max(rows, default=0))

    if plan.training.features.keep == "none":
        return own, 0.0, 0
    if disk_bytes is None:
        return own, 1.0, needed(own)
    for encoding in ENCODINGS[ENCODINGS.index(own) :]:
        if needed(encoding) <= disk_bytes:
            return encoding, 1.0, needed(encoding)
    share = disk_bytes / needed("int8")
    return "int8", share, disk_bytes


def _row_bytes(shape: tuple[int, ...], encoding: str) -> float:
    return prod(shape) * _BYTES[encoding] + (_SCALE_BYTES * prod(shape[:-1]) if encoding == "int8" else 0)


def _trace(plan: Plan, is_split: bool, on_progress: Callable[[str, int, int], None]) -> list[StageNeeds]:
    steps = len(plan.stages)
    return stage_needs(
        plan, plan.training.batch_size - 1 if is_split else None, lambda done, total: on_progress("trace", done, steps)
    )


def _layer_counts(plan: Plan) -> list[int]:
    """Layers per stage to try: the plan's own, then fewer; another strategy's stages stay as they are."""
    if plan.strategy != "layerwise":
        return [0]
    first = plan.stages[0]
    own = max(sum(1 for name in first.active if name.startswith(f"{m}.layers.")) for m in plan.model.modalities)
    return list(range(max(own, 1), 0, -1))  # none at all where the factory froze every layer


def _with_layers(plan: Plan, layers: int) -> Plan:
    own = _layer_counts(plan)[0]
    if layers in (0, own):
        return plan
    stages = make_stages(
        plan.model,
        "layerwise",
        sum(stage.rounds for stage in plan.stages),
        plan.stages[0].learning_rate,
        layers,
        freeze_stems=any(name.endswith(".stem") for name in plan.stages[0].frozen),
    )
    return plan.model_copy(update={"stages": stages})


def _takes_whole_batches(plan: Plan) -> bool:
    objective = plan.model.objective
    return objective.kind == "self_supervised" and objective.is_held


def _micro_batches(plan: Plan) -> list[int]:
    """The plan's own, then halves of it down to 1."""
    if _takes_whole_batches(plan):
        return [plan.training.batch_size]
    sizes, size = [], plan.training.samples_in_memory
    while size > 1:
        sizes.append(size)
        size //= 2
    return [*sizes, 1]
