"""Looks at every layer of a model before a long export: can each engine train it, can it run it frozen, and if not, why.

Each different segment is traced alone, forward and then joint with its backward pass, inside a stage of its own: the loss is
the mean square of what the segment gives (for the head, the objective), and the gradient also goes through to the segment's
input, as it does where a segment below trains too. So one layer that fails holds back no other. Nothing is lowered or run by
an engine: that an operator is known to an engine is `export.supported`'s word, and the export still checks each program.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from export import cut, inputs
from export.frozen import frozen_graph, segment_precision
from export.joint import joint_graph
from export.objectives import cross_entropy
from export.parameters import trained
from export.quiet import quiet
from export.supported import unsupported
from export.trace import Arrays, example_batch, forward_graph, graph_text
from export.trace_errors import explain, where
from lamina.errors import CutError
from lamina.manifest import LABEL
from lamina.model import ModelDescription, Supervised
from lamina.names import EngineName
from lamina.plan import Plan
from lamina.segments import HEAD, TensorSpec, classifier, norm, predictor, prefix_chain, projection

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

    @property
    def segments(self) -> tuple[str, ...]:
        return (self.segment, *self.like)

    def blocks(self, plan: Plan) -> bool:
        """Whether the plan cannot be exported for this engine: a stage trains or freezes a segment that cannot be so."""
        active = {name for stage in plan.stages for name in stage.active}
        frozen = {name for stage in plan.stages for name in stage.frozen}
        trained, kept = not active.isdisjoint(self.segments), not frozen.isdisjoint(self.segments)
        return self.is_refused or (trained and not self.trains) or (kept and self.runs_frozen is False)


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
    faults: Mapping[str, Exception] | None = None,
) -> list[Finding]:
    """What each engine can do with each different segment of the model, in exchange order; equal segments share a row.

    `faults` are those of `export.recipe.Resolved`: what was already found wrong with a segment is told and not looked at again.

    Raises CutError if the model has not the parts that `export.cut` describes; whatever else is wrong is a finding.
    """
    engines = tuple(engines)
    faults = faults or {}
    looks: dict[tuple[object, ...], list[_Part]] = {}
    for part in _parts(model, plan.model, faults):
        looks.setdefault(part.look, []).append(part)
    known: dict[tuple[object, ...], Outcomes] = {}
    rows: dict[tuple[object, ...], tuple[list[str], Outcomes]] = {}
    for done, parts in enumerate(looks.values()):
        on_progress(parts[0].name, done, len(looks))
        with quiet():  # torch writes the graph of what cannot be traced
            outcomes = _examine_part(parts[0], plan, engines, known)
        # Settings such as a layer's number make another look, but seldom another outcome.
        names, _ = rows.setdefault((parts[0].shape, tuple(outcomes.items())), ([], outcomes))
        names += [part.name for part in parts]
    on_progress("", len(looks), len(looks))
    return [
        Finding(segment=names[0], like=tuple(names[1:]), engine=engine, **vars(outcome))
        for names, outcomes in rows.values()
        for engine, outcome in outcomes.items()
    ] + _unowned(model, plan.model, engines, faults)


def _examine_part(
    part: _Part, plan: Plan, engines: tuple[EngineName, ...], known: dict[tuple[object, ...], Outcomes]
) -> Outcomes:
    frozen_if_failed = False if part.is_prefix else None

    def failed(reason: str, remedy: str, is_refused: bool = False) -> Outcomes:
        return {engine: _Outcome(False, frozen_if_failed, reason, remedy, is_refused) for engine in engines}

    fault = part.fault or _eager_fault(part, plan.model)
    if fault is not None:
        return failed(*fault, is_refused=True)
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


def _eager_fault(part: _Part, description: ModelDescription) -> tuple[str, str] | None:
    """(reason, remedy) of a segment that cannot be run on two random samples, or gives something else than promised."""
    (x,) = inputs.example_inputs(description, (part.takes,), 2)
    try:
        with torch.no_grad():
            y = part.module(x)
    except Exception as error:  # a user's layer may raise anything
        given = f"an input of shape {tuple(x.shape)} and {x.dtype}"
        return (
            f"it raises {type(error).__name__} for {given}: {_first_line(error)}{where(error)}",
            "let forward() take one such tensor and give one; the plan's input or features may also be wrong",
        )
    if not isinstance(y, Tensor):
        return (
            f"it gives a {type(y).__name__}, not a tensor",
            "wrap it in a module whose forward() takes one tensor and gives one",
        )
    if y.ndim < 2 or y.shape[0] != x.shape[0]:
        return f"it gives shape {tuple(y.shape)} for 2 samples", "keep the batch as the first axis of what forward() gives"
    promised = (2, *part.gives)
    if tuple(y.shape) != promised:
        return (
            f"it gives shape {tuple(y.shape)} for 2 samples, the plan promises {promised}",
            "make the two agree: change the layer, or the shapes in the plan",
        )
    if y.dtype != torch.float32:
        return f"it gives {y.dtype}, not torch.float32", "end forward() with .float()"
    return None


def _parts(model: nn.Module, description: ModelDescription, faults: Mapping[str, Exception]) -> list[_Part]:
    """Every segment with what it takes and gives, and what is wrong with its tensors; copies, in evaluation mode."""
    found, pools = cut.locate_segments(model, description), cut.locate_pools(model, description)
    pool_after = {norm(modality): pool for modality, pool in pools.items()}
    tied = _ties(found)
    parts = []
    for name, module in found.items():
        takes, gives = _promised(description, name)
        known = explain(faults[name]) if name in faults else None
        fault = known or _tensor_fault(module) or _tensor_fault(pool_after.get(name)) or tied.get(name)
        if fault is None:
            module = deepcopy(module).eval()
            if name in pool_after:
                module = nn.Sequential(module, deepcopy(pool_after[name]).eval())
        is_prefix = name in prefix_chain(description, takes.name) if takes.name in description.modalities else False
        parts.append(_Part(name, module, takes, gives, is_prefix, fault))
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


def _tensor_fault(module: nn.Module | None) -> tuple[str, str] | None:
    try:
        if module is not None:
            cut.check_tensors(module)
    except CutError as error:
        return explain(error)
    return None


def _ties(segments: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Segment -> (reason, remedy), for those that share a parameter with another one."""
    owners: dict[int, list[tuple[str, str]]] = {}
    for name, module in segments.items():
        for key, parameter in module.named_parameters():
            if parameter.requires_grad:  # a frozen one stays equal by itself
                owners.setdefault(id(parameter), []).append((name, key))
    found: dict[str, tuple[str, str]] = {}
    for places in owners.values():
        for name, key in places:
            others = [f"{other}/{its}" for other, its in places if other != name]
            if others:
                found.setdefault(
                    name,
                    (
                        f"its parameter {key!r} is tied to {', '.join(others)}: frozen in one segment and trained in "
                        "the other, it would not stay one",
                        "give each segment a parameter of its own, such as a copy",
                    ),
                )
    return found


def _unowned(
    model: nn.Module, description: ModelDescription, engines: tuple[EngineName, ...], faults: Mapping[str, Exception]
) -> list[Finding]:
    """What makes the export refuse the model and is in no segment: parameters, and faults of what the plan leaves out."""
    segments = cut.locate_segments(model, description)
    owned = {id(value) for module in segments.values() for value in module.parameters()}
    nobodys = "this parameter belongs to no segment: nobody would train or send it", "move it into a segment"
    found = {f"(parameter {key})": nobodys for key, value in model.named_parameters() if id(value) not in owned}
    found |= {name: explain(error) for name, error in faults.items() if name not in segments}
    return [
        Finding(name, (), engine, False, None, reason, remedy, is_refused=True)
        for name, (reason, remedy) in found.items()
        for engine in engines
    ]


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


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(dict.fromkeys(names)))
