"""Looks at every layer of a model before a long export: can each engine train it, can it run it frozen, and if not, why.

Each different segment is traced alone, forward and then joint with its backward pass, inside a stage of its own: the loss is
the mean square of what the segment gives (for the head, the objective), and the gradient also goes through to the segment's
input, as it does where a segment below trains too. So one layer that fails holds back no other. Nothing is lowered or run by
an engine: that an operator is known to an engine is `export.faults.supported`'s word, and the export still checks each program.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from export import inputs
from export.build import program_faults
from export.faults.faults import Fault
from export.faults.supported import unsupported
from export.faults.trace_errors import explain
from export.graphs import cut
from export.graphs.frozen import frozen_graph, segment_precision
from export.graphs.joint import joint_graph
from export.graphs.trace import Arrays, example_batch, forward_graph, graph_text
from export.models.copies import copied
from export.models.parameters import trained
from export.objectives.objectives import cross_entropy
from export.ops.quiet import quiet
from lamina.bundles.manifest import LABEL
from lamina.names import EngineName
from lamina.plans.model import ModelDescription, Supervised
from lamina.plans.plan import Plan
from lamina.plans.segments import HEAD, TensorSpec, classifier, norm, predictor, prefix_chain, projection

Progress = Callable[[str, int, int], None]
"""(segment, segments done, segments in all)"""
_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Finding:
    """One segment, and those that are `like` it, on one engine. `reason` and `remedy` are empty where all is well.

    `runs_frozen` is None for norms, projections and heads: they are active in every stage.
    """

    segment: str
    like: tuple[str, ...]
    engine: EngineName
    trains: bool
    runs_frozen: bool | None
    reason: str = ""
    remedy: str = ""
    is_refused: bool = False
    """No export at all takes a model with such a segment, whatever the stages do with it."""
    is_needed: bool = True
    """Whether a program of the plan needs what fails here; an export of that plan passes if none does."""

    @property
    def segments(self) -> tuple[str, ...]:
        return (self.segment, *self.like)

    def blocks(self, plan: Plan) -> bool:
        """Whether the plan cannot be exported for this engine: a stage trains or freezes a segment that cannot be so."""
        active = {name for stage in plan.stages for name in stage.active}
        frozen = {name for stage in plan.stages for name in stage.frozen}
        trained, kept = not active.isdisjoint(self.segments), not frozen.isdisjoint(self.segments)
        return self.is_refused or (self.is_needed and ((trained and not self.trains) or (kept and self.runs_frozen is False)))


@dataclass(frozen=True)
class _Outcome:
    trains: bool
    runs_frozen: bool | None
    reason: str = ""
    remedy: str = ""
    is_refused: bool = False


Outcomes = dict[EngineName, _Outcome]


@dataclass(frozen=True)
class _Part:
    """A segment as it is looked at: `module` takes `takes` and gives `gives`, both for one example."""

    name: str
    module: nn.Module
    takes: TensorSpec
    gives: tuple[int, ...]
    is_prefix: bool
    fault: tuple[str, str] | None = None

    @property
    def shape(self) -> tuple[object, ...]:
        """Equal for parts of the same classes and tensors, whatever their settings."""
        modules = tuple((key, type(module)) for key, module in self.module.named_modules())
        tensors = tuple(
            (key, tuple(value.shape), value.dtype, value.device.type, value.requires_grad)
            for key, value in (*self.module.named_parameters(), *self.module.named_buffers())
        )
        return (modules, tensors, self.takes.shape, self.takes.dtype, self.gives, self.is_prefix, self.name == HEAD, self.fault)

    @property
    def look(self) -> tuple[object, ...]:
        """Equal only for parts that compute the same: their settings are the same as well."""
        return (self.shape, tuple(_settings(module) for module in self.module.modules()))


def examine(
    plan: Plan,
    model: nn.Module,
    engines: Iterable[EngineName],
    on_progress: Progress = lambda segment, done, total: None,
    faults: Sequence[Fault] = (),
) -> list[Finding]:
    """What each engine can do with each different segment of the model, in exchange order; equal segments share a row.

    `faults` are those of `export.plans.resolve.Resolved`. The verdict is an export's own: what it meets before it lowers
    anything (`export.graphs.cut.plan_faults`, and then `export.build.program_faults`).

    Raises CutError if the model has not the parts that `export.graphs.cut` describes; whatever else is wrong is a finding.
    """
    engines = tuple(engines)
    model = copied(model)
    refused = [*faults, *cut.plan_faults(model, plan)]
    by_segment: dict[str, Fault] = {}
    for fault in refused:
        by_segment.setdefault(fault.where, fault)
    looks: dict[tuple[object, ...], list[_Part]] = {}
    for part in _parts(model, plan.model, by_segment):
        looks.setdefault(part.look, []).append(part)
    known: dict[tuple[object, ...], Outcomes] = {}
    rows: dict[tuple[object, ...], tuple[list[str], Outcomes]] = {}
    total = len(looks)
    for done, parts in enumerate(looks.values()):
        on_progress(parts[0].name, done, total)
        with quiet():  # torch writes the graph of what cannot be traced
            outcomes = _examine_part(parts[0], plan, engines, known)
        # Settings such as a layer's number make another look, but seldom another outcome.
        names, _ = rows.setdefault((parts[0].shape, tuple(outcomes.items())), ([], outcomes))
        names += [part.name for part in parts]
    on_progress("", total, total)
    findings = [
        Finding(segment=names[0], like=tuple(names[1:]), engine=engine, **vars(outcome))
        for names, outcomes in rows.values()
        for engine, outcome in outcomes.items()
    ]
    if refused:
        names = set(cut.locate_segments(model, plan.model))
        beside = [fault for name, fault in by_segment.items() if name not in names]
        return findings + [_beside(fault, engine) for fault in beside for engine in engines]
    with quiet():
        return _judged(findings, list(program_faults(plan, model, engines)), plan, engines)


def _judged(findings: Sequence[Finding], faults: Sequence[Fault], plan: Plan, engines: tuple[EngineName, ...]) -> list[Finding]:
    """The findings of segments with what the programs of the plan say, for each engine."""
    judged = list(findings)
    for engine in engines:
        own = [fault for fault in faults if fault.engine in (None, engine)]
        if not own:
            judged = [replace(each, is_needed=False) if each.engine == engine and each.reason else each for each in judged]
        elif not any(each.blocks(plan) for each in judged if each.engine == engine):
            judged += [_beside(fault, engine) for fault in own]
    return judged


def _beside(fault: Fault, engine: EngineName) -> Finding:
    return Finding(fault.where, (), engine, False, None, fault.reason, fault.remedy, is_refused=True)


def _examine_part(
    part: _Part, plan: Plan, engines: tuple[EngineName, ...], known: dict[tuple[object, ...], Outcomes]
) -> Outcomes:
    frozen_if_failed = False if part.is_prefix else None

    def failed(reason: str, remedy: str, is_refused: bool = False) -> Outcomes:
        return {engine: _Outcome(False, frozen_if_failed, reason, remedy, is_refused) for engine in engines}

    if part.fault is not None:
        return failed(*part.fault, is_refused=True)
    size = plan.training.samples_in_memory
    try:
        frozen = None
        if part.is_prefix:
            example = inputs.example_inputs(plan.model, (part.takes,), example_batch(size))
            frozen = frozen_graph(part.module, example, size, segment_precision(plan, part.name))
            key = (part.shape, graph_text(frozen))
            if key in known:
                return known[key]
    except Exception as error:  # torch raises whatever it likes, and so does the user's code
        return failed(*explain(error))
    joint, fault = _joint(part, plan, size)
    outcomes = {engine: _judge(engine, frozen, joint, fault) for engine in engines}
    if frozen is not None:
        known[key] = outcomes
    return outcomes


def _judge(
    engine: EngineName, frozen: ExportedProgram | None, joint: ExportedProgram | None, fault: tuple[str, str] | None
) -> _Outcome:
    """What an engine says to the operators of both graphs; `fault` tells why there is no joint graph, if it should be there."""
    lacks_frozen = unsupported(engine, frozen) if frozen is not None else []
    lacks_joint = unsupported(engine, joint) if joint is not None else []
    trains = fault is None and not lacks_joint
    runs = None if frozen is None else not lacks_frozen
    if fault is not None and not lacks_frozen:
        return _Outcome(trains, runs, *fault)
    forward = {operator for operator, _ in lacks_frozen}
    backward = {operator for operator, _ in lacks_joint} - forward
    parts = [_listed(forward)] if forward else []
    if backward:
        parts.append(_listed(backward) + (" in its backward pass" if frozen is not None else ""))
    reason = f"{engine} cannot run {', nor '.join(parts)}" if parts else ""
    remedies = dict.fromkeys(remedy for _, remedy in (*lacks_frozen, *lacks_joint))
    return _Outcome(trains, runs, reason, "; ".join(remedies))


def _joint(part: _Part, plan: Plan, size: int) -> tuple[ExportedProgram | None, tuple[str, str] | None]:
    """The joint graph of a stage that trains this segment alone, or why there is none; (None, None) if nothing is to train."""
    if isinstance(plan.model.objective, Supervised) and part.name == HEAD:
        specs = (part.takes, TensorSpec(name=LABEL, shape=(), dtype="int64"))
        stage: nn.Module = _HeadStage(part.module)
    else:
        specs = (part.takes,)
        # Nothing is below the first segment, and token ids have no gradient.
        stage = _SegmentStage(part.module, with_input=not part.name.endswith(".stem"))
    weights = trained(stage)
    if not weights:
        return None, None
    example = inputs.example_inputs(plan.model, specs, example_batch(size))
    names = ["its input" if key == "scale" else key.removeprefix("part.") for key in weights]
    try:
        forward = forward_graph(stage, example, size)
        return joint_graph(forward, names), None
    except Exception as error:  # as above
        return None, explain(error)


def _parts(model: nn.Module, description: ModelDescription, faults: Mapping[str, Fault]) -> list[_Part]:
    """Every segment with what it takes and gives, and its fault; copies, in evaluation mode."""
    segments, pools = cut.locate_segments(model, description), cut.locate_pools(model, description)
    pool_after = {norm(modality): pool for modality, pool in pools.items()}
    parts = []
    for name, module in segments.items():
        takes, gives = _promised(description, name)
        fault = faults.get(name)
        if fault is None:
            module = deepcopy(module).eval()
            if name in pool_after:
                module = nn.Sequential(module, deepcopy(pool_after[name]).eval())
        is_prefix = name in prefix_chain(description, takes.name) if takes.name in description.modalities else False
        known = None if fault is None else (fault.reason, fault.remedy)
        parts.append(_Part(name, module, takes, gives, is_prefix, known))
    return parts


def _promised(description: ModelDescription, name: str) -> tuple[TensorSpec, tuple[int, ...]]:
    """What a segment takes and the shape that it gives, by the description. A norm is looked at together with its pool."""
    if name == HEAD:
        assert isinstance(description.objective, Supervised)
        joined = description.projection.output * len(description.encoders)
        return TensorSpec(name=HEAD, shape=(joined,)), (description.objective.classes,)
    modality = name.split(".", maxsplit=1)[0]
    encoder = description.encoder(modality)
    output = description.projection.output
    if name == projection(modality):
        return TensorSpec(name=modality, shape=(encoder.width,)), (output,)
    if name == predictor(modality):
        return TensorSpec(name=modality, shape=(output,)), (output,)
    if name == classifier(modality):
        assert isinstance(description.objective, Supervised)
        return TensorSpec(name=modality, shape=(output,)), (description.objective.classes,)
    if name == norm(modality):
        return inputs.features(encoder, encoder.layers), (encoder.width,)
    return inputs.segment_input(description, name), encoder.feature_shape(prefix_chain(description, modality).index(name))


class _SegmentStage(nn.Module):
    """(mean square of what a segment gives, its sum). The scale of the input makes the gradient go through the segment."""

    def __init__(self, part: nn.Module, with_input: bool) -> None:
        super().__init__()
        self.part = part
        self.scale = nn.Parameter(torch.ones(1)) if with_input else None

    def forward(self, x: Tensor) -> Arrays:
        y = self.part(x if self.scale is None else x * self.scale)
        return (y * y).mean(), y.sum().detach()


class _HeadStage(nn.Module):
    """The supervised objective on the joined embeddings, whose gradient is asked for as well."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, label: Tensor) -> Arrays:
        return cross_entropy(self.part(x * self.scale), label)


def _settings(module: nn.Module) -> tuple[object, ...]:
    """Attributes that are no tensors or modules; an object that is not plain is compared by identity."""
    plain = (bool, int, float, str, bytes, type(None))

    def value(given: object) -> object:
        if isinstance(given, plain):
            return (type(given).__name__, given)
        if isinstance(given, tuple | list):
            return tuple(value(item) for item in given)
        return id(given)

    return tuple((key, value(given)) for key, given in sorted(vars(module).items()) if key not in _OWN_ATTRIBUTES)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(dict.fromkeys(names)))
