"""Cutting: model + stage -> a module that holds the active segments and nothing else.

The frozen prefix is not flagged but absent: its layers are no part of the cut module, so no graph traced from it can hold
them. Where a modality's stem is active, the cut module takes the raw input, else the features that its frozen prefix made.

Any `nn.Module` of this shape can be cut (`export.models.models` describes it in words):

    model.encoders[modality].stem      raw input -> features, such as (batch, tokens, width)
    model.encoders[modality].layers    a ModuleList of features -> features; the shape may change from layer to layer
    model.encoders[modality].norm      the last shape again; `nn.Identity()` if there is none
    model.encoders[modality].pool      those -> (batch, width), without parameters; if there is none, the mean over tokens
    model.projections[modality]        (batch, width) -> (batch, output)
    model.predictors[modality]         (batch, output) -> the same, for moco and byol
    model.classifiers[modality]        (batch, output) -> (batch, classes), for gradient blending
    model.head                         the joined projections -> (batch, classes), for a supervised objective: one of
                                       `export.objectives.fusions`, or any module that takes them side by side in one tensor

Everything is in evaluation mode: dropout is off and batch norm has frozen statistics, in training as in evaluation. What cannot
be cut is refused here, before anything is traced, with the name of the layer or tensor and the way out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from export.faults.faults import Fault, end_faults, model_faults, raise_first
from export.faults.faults import run_segment as run_segment
from export.graphs.stage_module import MAIN_TERM, StageModule, Terms, copies_of
from export.inputs import LABELS, features, segment_input
from export.models import parameters
from export.trunk import MeanTokens
from lamina.bundles.manifest import ProgramReference, second_view
from lamina.errors import CutError
from lamina.names import ANY_MODALITY
from lamina.plans.model import ModelDescription, SelfSupervised, Supervised
from lamina.plans.plan import Plan, Stage
from lamina.plans.segments import (
    HEAD,
    Segment,
    TensorSpec,
    belongs,
    classifier,
    heads_of,
    layer,
    norm,
    projection,
    segment_names,
    stem,
)

Segments = Mapping[str, nn.Module]


def find_segments(model: nn.Module, description: ModelDescription) -> dict[str, nn.Module]:
    """Segment name -> module of the model, in exchange order; what can be seen of it without tracing has been checked.

    Raises CutError if the model is not of the shape above, or one of its segments cannot be trained or run.
    """
    segments = locate_segments(model, description)
    raise_first(model_faults(model, segments, locate_pools(model, description), description))
    return segments


def plan_faults(model: nn.Module, plan: Plan) -> Iterator[Fault]:
    """Every fault of a plan's model that can be seen without tracing; those of single stages only where there is no other.

    Raises CutError if a part is missing.
    """
    segments, pools = locate_segments(model, plan.model), locate_pools(model, plan.model)
    is_sound = True
    for fault in model_faults(model, segments, pools, plan.model):
        is_sound = False
        yield fault
    if is_sound:
        for stage in plan.stages:
            yield from end_faults(segments, pools, plan.model, stage)


def locate_segments(model: nn.Module, description: ModelDescription) -> dict[str, nn.Module]:
    """Segment name -> module of the model, in exchange order, whatever may be wrong with the modules themselves.

    Raises CutError if a part is missing, or the model has other segments than the description.
    """
    encoders, projections = _child(model, "encoders"), _child(model, "projections")
    found: dict[str, nn.Module] = {}
    for modality in description.modalities:
        where = f"encoders[{modality!r}]"
        encoder = _item(encoders, modality, "encoders")
        layers = list(_child(encoder, "layers", where).children())
        if not layers:
            raise CutError(f"{where} has no layers: a strategy needs at least one to train; give `layers` one module each")
        found[stem(modality)] = _child(encoder, "stem", where)
        found |= {layer(modality, index): module for index, module in enumerate(layers)}
        found[norm(modality)] = _child(encoder, "norm", where)
        found[projection(modality)] = _item(projections, modality, "projections")
        for name in heads_of(description, modality)[1:]:
            group = "classifiers" if name == classifier(modality) else "predictors"
            found[name] = _item(_child(model, group), modality, group)
    if isinstance(description.objective, Supervised):
        found[HEAD] = _child(model, "head")
    if list(found) != segment_names(description):
        raise CutError(
            f"the model's segments are not those of its description {description.name!r}: "
            f"only in the model {sorted(set(found) - set(segment_names(description)))}, "
            f"only in the description {sorted(set(segment_names(description)) - set(found))}; make the two agree"
        )
    return found


def find_pools(model: nn.Module, description: ModelDescription) -> dict[str, nn.Module]:
    """As `locate_pools`. Raises CutError for a pool with parameters."""
    pools = locate_pools(model, description)
    for modality, pool in pools.items():
        if any(True for _ in pool.parameters()):
            raise CutError(f"encoders[{modality!r}].pool has parameters, which no stage would train; move them into `norm`")
    return pools


def locate_pools(model: nn.Module, description: ModelDescription) -> dict[str, nn.Module]:
    """Modality -> the module that makes (batch, width) of the normalised features."""
    encoders = _child(model, "encoders")
    return {
        modality: getattr(_item(encoders, modality, "encoders"), "pool", None) or MeanTokens()
        for modality in description.modalities
    }


def describe_segment(name: str, module: nn.Module, description: ModelDescription) -> Segment:
    """A segment with its tensors in the order of `named_parameters()`: the exchange order of those that are trained."""
    modality = name.split(".", maxsplit=1)[0]
    return Segment(
        name=name,
        modality=modality if modality in description.modalities and name != HEAD else None,
        tensors=_specs(parameters.trained(module)),
        frozen=_specs(parameters.frozen(module)),
    )


def _specs(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=key, shape=tuple(value.shape)) for key, value in tensors.items())


@dataclass(frozen=True)
class StageCut:
    """The active part of a stage.

    `module(*tensors of each reference, *inputs)` gives (loss, correct), or one embedding (batch, output) for each input.
    `weights` names its trained parameters `segment/tensor`, `frozen` those that the user froze, both in the order of
    `module.parameters()`; `inputs` are its batch inputs without the batch axis; `references` are the copies of its parameters
    that a training step takes. `evaluation(*inputs)` has the same parameters and the main term of the loss alone. Where the cut
    goes until embeddings, `module` takes no references, and `evaluation(*tensors of each reference, *inputs)` gives the keys of
    the momentum copy as well. Both are one module where there is nothing to tell apart. `description` is the model as the
    device trains it (`lamina.plans.model.ModelDescription.of_device`).
    """

    module: StageModule
    evaluation: StageModule
    weights: tuple[TensorSpec, ...]
    frozen: tuple[TensorSpec, ...]
    inputs: tuple[TensorSpec, ...]
    references: tuple[ProgramReference, ...]
    description: ModelDescription

    @property
    def frozen_values(self) -> int:
        """How many numbers of the active segments are never trained."""
        return sum(spec.count for spec in self.frozen)

    @property
    def reference_sizes(self) -> list[int]:
        """How many numbers each reference has."""
        return [sum(self.weights[place].count for place in reference.tensors) for reference in self.references]


def cut_stage(
    segments: Segments,
    description: ModelDescription,
    stage: Stage,
    *,
    pools: Mapping[str, nn.Module] | None = None,
    until_embeddings: bool = False,
    terms: Terms | None = None,
    present: Sequence[str] = (),
) -> StageCut:
    """The cut module of a stage: a copy of the active segments; the given model stays as it is.

    `pools` are those of `find_pools`; without them, every modality takes the mean over its tokens.
    `until_embeddings` leaves out the objective and the label, for an objective without a head of its own.
    `terms` are those of the training loss: without them all that the objective has, but a teacher only after the first stage.
    `present` are the modalities of a device that has not all of them: the cut has their segments and the head. Where it has the
    two views of one modality instead of a pair, its inputs are named for none (`lamina.names.ANY_MODALITY`).
    """
    chosen = pools or {modality: MeanTokens() for modality in description.modalities}
    raise_first(end_faults(segments, chosen, description, stage))
    has_views_for_pairs = description.of_device(present) is not description
    description = description.of_device(present)
    present = present or description.modalities
    absent = [modality for modality in description.modalities if modality not in present]
    terms = terms or Terms(has_teacher=stage.index > 0)
    names = [name for name in stage.active if belongs(name, present)]
    parts = copies_of(segments, names)

    def module(of: Terms, is_judged: bool, with_keys: bool = False) -> StageModule:
        return StageModule(
            parts,
            chosen,
            description,
            stage,
            names,
            of,
            is_judged=is_judged,
            absent=absent,
            until_embeddings=until_embeddings,
            with_keys=with_keys,
        ).eval()

    trained = evaluation = module(terms, is_judged=False)
    described = [describe_segment(name, segments[name], description) for name in names]
    weights = tuple(_within(each.name, spec) for each in described for spec in each.tensors)
    frozen = tuple(_within(each.name, spec) for each in described for spec in each.frozen)
    if not weights:
        raise CutError(
            f"stage {stage.index} trains nothing: all parameters of {', '.join(names)} have requires_grad=False; let one of "
            "them be trained, or leave the stage out"
        )
    if [spec.shape for spec in (*weights, *frozen)] != [tuple(value.shape) for value in parameters.in_order(trained).values()]:
        raise CutError(f"stage {stage.index}: the cut module's tensors are not in exchange order; this is a fault of lamina")
    inputs = _batch_inputs(description, stage, present, with_label=not until_embeddings)
    objective = description.objective
    if until_embeddings:
        if isinstance(objective, SelfSupervised) and objective.has_predictor:
            evaluation = module(MAIN_TERM, is_judged=False, with_keys=True)
    elif trained.reference_specs or (terms.blend and any(name == classifier(m) for m in present for name in names)):
        evaluation = module(MAIN_TERM, is_judged=True)
    return StageCut(
        module=trained,
        evaluation=evaluation,
        weights=weights,
        frozen=frozen,
        inputs=_named_for_any(inputs) if has_views_for_pairs else inputs,
        references=evaluation.reference_specs if until_embeddings else trained.reference_specs,
        description=description,
    )


def _within(segment: str, tensor: TensorSpec) -> TensorSpec:
    return tensor.model_copy(update={"name": f"{segment}/{tensor.name}"})


def _named_for_any(views: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    names = (ANY_MODALITY, second_view(ANY_MODALITY))
    return tuple(spec.model_copy(update={"name": name}) for spec, name in zip(views, names, strict=True))


def _batch_inputs(
    description: ModelDescription, stage: Stage, present: Sequence[str], with_label: bool
) -> tuple[TensorSpec, ...]:
    inputs = [
        segment_input(description, stage.active_chain(description, m)[0])
        if stage.active_chain(description, m)
        else features(description.encoder(m), len(stage.frozen_chain(description, m)) - 1)
        for m in present
    ]
    if isinstance(description.objective, SelfSupervised):
        inputs += [spec.model_copy(update={"name": second_view(spec.name)}) for spec in inputs]
    if with_label and description.labels is not None:
        inputs.append(LABELS)
    return tuple(inputs)


def _child(module: nn.Module, name: str, where: str = "the model") -> nn.Module:
    child = getattr(module, name, None)
    if not isinstance(child, nn.Module):
        raise CutError(f"{where} has no module `{name}`; see export/graphs/cut.py for the shape that a model must have")
    return child


def _item(modules: nn.Module, modality: str, where: str) -> nn.Module:
    child = dict(modules.named_children()).get(modality)
    if child is None:
        raise CutError(
            f"{where} has no module for modality {modality!r}, only {[name for name, _ in modules.named_children()]}"
        )
    return child
