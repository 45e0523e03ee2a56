"""The cost report: segments -> what each stage of a plan costs a device, with nothing traced, exported or trained.

    modules, one example each, stages -> `cost_report` -> `lamina.figures.cost_report.CostReport`

Parameters, statistics and FLOPs are read off the modules themselves, each segment counted once. `plan_costs` does it for a plan
and its model; `benchmarks.published` gives the segments of published models to the same function. docs/cost.md explains the
conventions.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from export.cost.counts import TRAINING_FACTOR, count_forward, counted_views
from export.faults.faults import raise_first
from export.graphs.cut import locate_segments, plan_faults
from export.models import parameters
from lamina.errors import ConfigError, CutError
from lamina.figures.cost_report import (
    Accounting,
    CostReport,
    RunCost,
    RunCosts,
    Savings,
    SegmentCost,
    StageCosts,
    StepCost,
    file_bytes,
)
from lamina.plans.model import Supervised
from lamina.plans.plan import Plan, Stage
from lamina.plans.segments import HEAD, TensorSpec, heads_of
from lamina.plans.strategies import freeze_fixed

Examples = Mapping[str, tuple[Tensor, ...]]


def plan_costs(plan: Plan, model: nn.Module, accounting: Accounting | None = None) -> CostReport:
    """The report of a plan for a model of the shape that `export.graphs.cut` describes. Raises CutError if it is of another
    shape.

    Without `accounting`: frozen weights stay on the device, and files are in the plan's encodings.
    """
    raise_first(plan_faults(model, plan))
    training = plan.training
    segments = locate_segments(model, plan.model)
    plan = freeze_fixed(plan, parameters.fixed_segments(segments, plan.model))
    return cost_report(
        segments,
        plan_examples(plan),
        plan.stages,
        name=plan.name,
        strategy=plan.strategy,
        accounting=accounting
        or Accounting(download_encoding=training.download_encoding, upload_encoding=training.upload_encoding),
        local_epochs=training.local_epochs,
        views=training.features.views,
        views_per_epoch=2 if plan.model.objective.kind == "self_supervised" else 1,
        passes=counted_views(plan.model),
        training_factor=plan.passes_of_a_step,
    )


def plan_examples(plan: Plan) -> dict[str, tuple[Tensor, ...]]:
    """What each segment takes for one sample, as the description promises: segment name -> (tensor,) with a batch axis of 1."""
    found: dict[str, tuple[Tensor, ...]] = {}
    for encoder in plan.model.encoders:
        name = encoder.modality
        is_text = encoder.input.kind == "text_tokens"
        found[f"{name}.stem"] = (torch.zeros(1, *encoder.input.shape, dtype=torch.int64 if is_text else torch.float32),)
        for index in range(encoder.layers):
            found[f"{name}.layers.{index}"] = (torch.zeros(1, *encoder.feature_shape(index)),)
        found[f"{name}.norm"] = (torch.zeros(1, *encoder.feature_shape(encoder.layers)),)
        found[f"{name}.projection"] = (torch.zeros(1, encoder.width),)
        for head in heads_of(plan.model, name)[1:]:
            found[head] = (torch.zeros(1, plan.model.projection.output),)
    if isinstance(plan.model.objective, Supervised):
        found[HEAD] = (torch.zeros(1, len(plan.model.encoders) * plan.model.projection.output),)
    return found


def cost_report(
    segments: Mapping[str, nn.Module],
    examples: Examples,
    stages: Sequence[Stage],
    *,
    name: str,
    strategy: str = "",
    unused: Iterable[nn.Module] = (),
    accounting: Accounting | None = None,
    local_epochs: int = 1,
    views: int = 1,
    views_per_epoch: int = 1,
    passes: int = 1,
    training_factor: int = TRAINING_FACTOR,
) -> CostReport:
    """What the stages cost one device.

    `passes` are the forward passes that one training sample takes: two with SimCLR, by the convention of `export.cost.counts`.
    An active segment costs `training_factor` of them (`lamina.plans.plan.Plan.passes_of_a_step`), end to end three. Stored
    features are made once for each of `views` that a stage takes, `views_per_epoch` in an epoch.

    `segments` are named as in `lamina.plans.segments`, in exchange order; what is no stem, layer or norm is a head. `examples`
    hold one sample for each of them, on the segment's device (`meta` will do). `unused` are parts of the model that are stored
    but never run, trained or sent. Raises ConfigError for names that do not fit together, CutError for a segment that cannot
    take its example or shares a parameter with another.
    """
    accounting = accounting or Accounting()
    _check_names(segments, examples, stages)
    _check_ownership(segments)
    counted = {key: _segment_cost(key, module, examples[key]) for key, module in segments.items()}
    tensors = {key: _exchanged(module) for key, module in segments.items()}
    constants = {key: _specs(parameters.frozen(module)) for key, module in segments.items()}
    unused = list(unused)
    unused_bytes = sum(map(_stored_bytes, unused))
    report = _Counter(counted, tensors, constants, unused_bytes, accounting, passes, training_factor)
    whole_model = _Counter(counted, tensors, constants, unused_bytes, accounting, passes)

    rounds = sum(stage.rounds for stage in stages)
    whole = Stage(index=0, active=tuple(segments), rounds=rounds, learning_rate=1.0)  # its rate costs nothing
    found, cached, attached = [], set[str](), set[str]()
    for stage in stages:
        found.append(report.stage(stage, cached, attached))
        if stage.rounds:
            cached |= set(stage.frozen)
            attached |= {*stage.active, *stage.frozen}
    end_to_end = whole_model.stage(whole)
    in_fp32 = accounting.model_copy(update=_FP32)
    baseline = _Counter(counted, tensors, constants, unused_bytes, in_fp32, passes).stage(whole)

    def versions(rounds: int) -> int:
        return min(views, rounds * local_epochs * views_per_epoch)

    def run(part: Callable[[StageCosts], StepCost]) -> RunCosts:
        fills_each_round = accounting.frozen_weights == "downloaded"
        mine = _run_cost([(stage.rounds, part(stage)) for stage in found], local_epochs, versions, fills_each_round)
        whole_run = _run_cost([(rounds, part(end_to_end))], local_epochs, versions, fills_each_round)
        return RunCosts(plan=mine, end_to_end=whole_run, savings=_savings(mine, whole_run, rounds * part(baseline).round_bytes))

    return CostReport(
        name=name,
        strategy=strategy,
        accounting=accounting,
        local_epochs=local_epochs,
        views=views,
        segments=tuple(counted.values()),
        unused_parameters=sum(p.numel() for module in unused for p in module.parameters()),
        stages=tuple(found),
        end_to_end=end_to_end,
        with_heads=run(lambda stage: stage.with_heads),
        without_heads=run(lambda stage: stage.without_heads),
    )


_FP32 = {"download_encoding": "fp32", "upload_encoding": "fp32"}


class _Counter:
    """Adds segments up to stages."""

    def __init__(
        self,
        segments: Mapping[str, SegmentCost],
        tensors: Mapping[str, tuple[TensorSpec, ...]],
        constants: Mapping[str, tuple[TensorSpec, ...]],
        unused_bytes: int,
        accounting: Accounting,
        passes: int,
        training_factor: int = TRAINING_FACTOR,
    ) -> None:
        self.segments, self.tensors, self.constants = segments, tensors, constants
        self.unused_bytes, self.accounting = unused_bytes, accounting
        self.passes, self.training_factor = passes, training_factor

    def stage(self, stage: Stage, cached: Collection[str] = (), attached: Collection[str] = ()) -> StageCosts:
        """`cached` are the frozen segments whose features the device stored in an earlier stage, `attached` all segments that
        it had then."""
        bare = [name for name in stage.active if not self.segments[name].is_head]
        return StageCosts(
            index=stage.index,
            rounds=stage.rounds,
            active=stage.active,
            frozen=stage.frozen,
            with_heads=self._step(stage.active, stage.frozen, cached, attached),
            without_heads=self._step(bare, stage.frozen, cached, attached),
        )

    def _step(
        self, active: Sequence[str], frozen: Sequence[str], cached: Collection[str], attached: Collection[str]
    ) -> StepCost:
        is_kept = self.accounting.frozen_weights == "resident"
        shares = self._shares(active, frozen)
        down = Fraction(sum(map(self._download, active)))
        if not is_kept:
            down += sum(share * (self._download(name) + self._constants(name)) for name, share in shares.items())
            down += sum(map(self._constants, active))
        new = [name for name in frozen if not is_kept or name not in cached]
        constants = sum(self.segments[name].constants for name in (*active, *frozen))
        return StepCost(
            active_parameters=sum(self.segments[name].parameters for name in active),
            frozen_parameters=sum(self.segments[name].parameters for name in frozen) + constants,
            active_bytes=4 * self._values(active),
            frozen_bytes=4 * (self._values(frozen) + constants),
            model_bytes=self.unused_bytes + sum(self.segments[name].stored_bytes for name in (*active, *frozen)),
            training_flops_per_sample=self.passes * self.training_factor * self._macs(active),
            prefix_flops_per_sample=round(
                self.passes * sum(share * self.segments[name].forward_macs for name, share in shares.items())
            ),
            fill_flops_per_sample=self._macs(new) if self.accounting.layer_budget is None else None,
            round_bytes_down=round(down),
            round_bytes_up=self._upload(active),
            prefix_bytes_down=sum(map(self._download, frozen)) + sum(map(self._constants, (*active, *frozen))),
            new_prefix_bytes_down=sum(map(self._download, new)) + self._new_constants((*active, *frozen), attached)
            if is_kept
            else 0,
        )

    def _shares(self, active: Sequence[str], frozen: Sequence[str]) -> dict[str, Fraction]:
        """Frozen segment -> the share of rounds in which it is in use.

        Under depth dropout an encoder's first layer always is, and all that is no layer; of the others as many as the budget
        leaves, each equally often.
        """
        shares = {name: Fraction(1) for name in frozen}
        budget = self.accounting.layer_budget
        if budget is None:
            return shares
        for modality in dict.fromkeys(map(_modality, frozen)):
            layers = [name for name in frozen if _is_layer(name) and _modality(name) == modality]
            free = budget - sum(_is_layer(name) and _modality(name) == modality for name in active)
            if layers and free < 1:
                raise ConfigError(
                    f"layer budget {budget}: a stage trains {budget - free} layers of {modality!r}, and the first frozen layer "
                    f"is always in use; give at least {budget - free + 1}"
                )
            for name in layers[1:] if free < len(layers) else ():
                shares[name] = Fraction(free - 1, len(layers) - 1)
        return shares

    def _download(self, name: str) -> int:
        """Weights come as one file for each segment."""
        return file_bytes(self.tensors[name], self.accounting.download_encoding, with_header=self.accounting.file_headers)

    def _constants(self, name: str) -> int:
        """Bytes of what is never trained: a file of its own for a segment that has any, float32 in every plan."""
        specs = self.constants[name]
        return file_bytes(specs, "fp32", with_header=self.accounting.file_headers) if specs else 0

    def _new_constants(self, names: Iterable[str], attached: Collection[str]) -> int:
        return sum(self._constants(name) for name in names if name not in attached)

    def _upload(self, names: Iterable[str]) -> int:
        """An update is one file; its tensors are named `segment/tensor`."""
        specs = [spec.model_copy(update={"name": f"{name}/{spec.name}"}) for name in names for spec in self.tensors[name]]
        return file_bytes(specs, self.accounting.upload_encoding, with_header=self.accounting.file_headers) if specs else 0

    def _macs(self, names: Iterable[str]) -> int:
        return sum(self.segments[name].forward_macs for name in names)

    def _values(self, names: Iterable[str]) -> int:
        return sum(self.segments[name].parameters + self.segments[name].statistics for name in names)


def _run_cost(
    steps: Sequence[tuple[int, StepCost]], local_epochs: int, versions: Callable[[int], int], fills_each_round: bool
) -> RunCost:
    """(rounds, cost) of each stage -> the run. `versions` says how many versions of an example so many rounds take.

    Stages without rounds train nobody, so they fill no cache and fetch nothing.
    """
    trained = [(rounds, step) for rounds, step in steps if rounds]
    fills = [
        (rounds * versions(1) if fills_each_round else versions(rounds), step.fill_flops_per_sample) for rounds, step in trained
    ]
    return RunCost(
        training_flops=sum(rounds * local_epochs * step.training_flops_per_sample for rounds, step in trained),
        prefix_flops=sum(rounds * local_epochs * step.prefix_flops_per_sample for rounds, step in trained),
        fill_flops=None if any(fill is None for _, fill in fills) else sum(times * (fill or 0) for times, fill in fills),
        bytes_down=sum(rounds * step.round_bytes_down for rounds, step in trained),
        bytes_up=sum(rounds * step.round_bytes_up for rounds, step in trained),
        new_prefix_bytes_down=sum(step.new_prefix_bytes_down for _, step in trained),
    )


def _savings(plan: RunCost, whole: RunCost, whole_fp32_bytes: int) -> Savings:
    fetched = plan.bytes_moved + plan.new_prefix_bytes_down
    has_cache = plan.fill_flops is not None
    return Savings(
        communication=_ratio(whole.bytes_moved, plan.bytes_moved),
        communication_with_prefix=_ratio(whole.bytes_moved, fetched),
        communication_against_fp32=_ratio(whole_fp32_bytes, fetched),
        flops=_ratio(whole.training_flops, plan.flops),
        flops_cached_steps=_ratio(whole.training_flops, plan.training_flops) if has_cache else None,
        flops_cached=_ratio(whole.training_flops, plan.cached_flops) if has_cache else None,
    )


def _ratio(whole: int, part: int | None) -> float | None:
    """How many times less `part` is; None where it is nothing at all."""
    return whole / part if part else None


def _segment_cost(name: str, module: nn.Module, example: tuple[Tensor, ...]) -> SegmentCost:
    modes = {part: part.training for part in module.modules()}
    module.eval()  # batch norm cannot train on one sample
    try:
        macs, uncounted = count_forward(module, example)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in example)
        raise CutError(f"{name} cannot take an example of shape {shapes}: {error}") from error
    finally:
        for part, was_training in modes.items():
            part.training = was_training
    count = sum(p.numel() for p in parameters.trained(module).values())
    return SegmentCost(
        name=name,
        is_head=not _is_layer(name) and not name.endswith((".stem", ".norm")),
        parameters=count,
        statistics=sum(spec.count for spec in _exchanged(module)) - count,
        constants=sum(p.numel() for p in parameters.frozen(module).values()),
        stored_bytes=_stored_bytes(module),
        forward_macs=macs,
        uncounted=uncounted,
    )


def _exchanged(module: nn.Module) -> tuple[TensorSpec, ...]:
    """Trained parameters, and the buffers that an average over devices makes sense for: statistics of batch norm. Others are
    constants, which programs carry."""
    statistics = {
        key: value for key, value in module.named_buffers() if key.endswith("running_mean") or key.endswith("running_var")
    }
    return _specs(parameters.trained(module) | statistics)


def _specs(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=key, shape=tuple(value.shape)) for key, value in tensors.items())


def _stored_bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in (*module.parameters(), *module.buffers()))


def _modality(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


def _is_layer(name: str) -> bool:
    return ".layers." in name


def _check_names(segments: Mapping[str, nn.Module], examples: Examples, stages: Sequence[Stage]) -> None:
    lacking = [name for name in segments if name not in examples]
    if lacking:
        raise ConfigError(f"segment {lacking[0]!r} has no example to count its FLOPs with; give one sample for each segment")
    for stage in stages:
        unknown = [name for name in (*stage.active, *stage.frozen) if name not in segments]
        if unknown:
            raise ConfigError(f"stage {stage.index} names segment {unknown[0]!r}; the model has {', '.join(segments)}")
        both = set(stage.active) & set(stage.frozen)
        if both:
            raise ConfigError(f"stage {stage.index} has segments both active and frozen: {sorted(both)}; choose one for each")
    if not any(stage.rounds for stage in stages):
        raise ConfigError("every stage has 0 rounds: there is nothing to count; give at least one stage a round")


def _check_ownership(segments: Mapping[str, nn.Module]) -> None:
    owner: dict[int, str] = {}
    for name, module in segments.items():
        for key, value in module.named_parameters():
            first = owner.setdefault(id(value), name)
            if first != name and value.requires_grad:
                raise CutError(f"{name}/{key} belongs to {first} too and would be counted twice; give each segment its own")
