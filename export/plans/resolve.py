"""Plan files and factories -> a plan and the model that it starts from.

birds.toml, plan.json       a recipe (`lamina.plans.recipe`) or a whole plan
my_models:make_vit          a factory alone: everything else by default, or by the options of the command
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from export.faults.faults import Fault, look, raise_first, tensor_faults
from export.faults.mending import mended
from export.inputs import random_input
from export.models.adapters import adapt
from export.models.factory import call_factory, library_errors
from export.models.models import build_model, make_trunks, planned_trunks
from export.models.parameters import fixed_in
from export.models.proofs import named_parts
from export.trunk import Trunk
from lamina.bundles.manifest import Rewrite
from lamina.errors import ConfigError, CutError
from lamina.plans.model import Encoder, ModelDescription, ModuleEncoder, Projection
from lamina.plans.plan import Plan
from lamina.plans.recipe import EncoderRecipe, Recipe, read_recipe
from lamina.plans.segments import norm, projection
from lamina.plans.strategies import freeze_fixed, make_stages
from lamina.record import listed

_POOLED_AXES = 2  # batch and width
_MERGED = ("training", "cohort")
_SAME_IN_A_PLAN = (
    "training",
    "cohort",
    "self_tuning",
    "calibration",
    "device_modalities",
    "zero_init",
    "aggregation",
    "server_learning_rate",
    "seed",
    "data_card",
)
_NAMES = {
    "image": "image",
    "image_patches": "image",
    "text_tokens": "text",
    "audio_frames": "audio",
    "sensor_windows": "motion",
}


@dataclass(frozen=True)
class Resolved:
    """A plan with everything decided, and the model with the weights to start from.

    `notes` are the adapters' remarks; `rewrites` what was replaced in the user's modules before the export. No export takes a
    model with `faults`.
    """

    plan: Plan
    model: nn.Module
    notes: tuple[str, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    faults: tuple[Fault, ...] = ()


def resolve(source: str, changes: Mapping[str, Any] | None = None, *, check: bool = True) -> Resolved:
    """Reads a plan file, or calls a factory. `changes` replace keys of the recipe (`training` and `cohort` are merged key by
    key).

    Raises the error of the first fault, unless `check` is off, so that `export.faults.survey` can list all: then tensors of
    another precision or device are float32 on the CPU in the model, and shapes behind a layer that fails are unknown.

    Raises ConfigError for a file or key that is wrong, ExportError for a factory that raises, CutError for a model that does
    not fit.
    """
    changes = {key: value for key, value in (changes or {}).items() if value is not None}
    resolved = _read(source, changes)
    if check:
        raise_first(resolved.faults)
    return resolved


def _read(source: str, changes: Mapping[str, Any]) -> Resolved:
    if is_factory(source):
        return _from_recipe(_recipe_of_factory(source, changes), changes)
    found = read_recipe(Path(source))
    if isinstance(found, Recipe):
        return _from_recipe(found, changes)
    plan = _changed_plan(found, changes, source)
    trunks = planned_trunks({e.modality: e for e in plan.model.encoders if isinstance(e, ModuleEncoder)}, plan.seed)
    return _resolved(freeze_fixed(plan, _fixed(trunks)), build_model(plan.model, plan.seed, trunks), trunks)


def is_factory(source: str) -> bool:
    """Whether the text names a function rather than a file."""
    return ":" in source and not Path(source).exists() and "/" not in source and "\\" not in source


def describe_trunk(modality: str, recipe: EncoderRecipe, trunk: Trunk) -> tuple[ModuleEncoder, Trunk]:
    """The description of a trunk, by running it on two random samples; and the trunk with the layers that are wanted.

    A segment that fails is one of its `faults`, as are those behind it, whose input nobody knows: the description repeats the
    last shape that is known.
    """
    where = f"{recipe.factory} ({modality})"
    count = recipe.layers or len(trunk.layers)
    if not trunk.layers:
        raise CutError(f"{where} has no layers: a strategy needs at least one to train")
    if count > len(trunk.layers):
        raise ConfigError(f"{where} has {len(trunk.layers)} layers, the plan wants {count}")
    trunk = replace(trunk, layers=trunk.layers[:count])
    shapes, faults = _shapes(modality, trunk)
    spec = ModuleEncoder(
        modality=modality,
        factory=recipe.factory or "",
        arguments=recipe.arguments,
        options=recipe.options,
        input=trunk.input,
        features=tuple(shapes[: count + 1]),
        width=shapes[-1][-1],
    )
    return spec, replace(trunk, faults=(*trunk.faults, *faults))


def _shapes(modality: str, trunk: Trunk) -> tuple[list[tuple[int, ...]], list[Fault]]:
    """What each part and at last the pool give for one example, and the faults on the way."""
    parts = named_parts(modality, trunk)
    faults = [fault for name, part in parts.items() for fault in tensor_faults(name, part)]
    names = [*parts, projection(modality)]
    shapes: list[tuple[int, ...]] = []
    x = random_input(trunk.input)
    for place, part in (*parts.items(), (norm(modality), trunk.pool)):
        name = place if part is not trunk.pool else f"{modality}.pool"
        y, fault = look(place, name, part, x, None)
        if fault is None and part is trunk.pool and y is not None and y.ndim != _POOLED_AXES:
            reason, remedy = f"gives shape {tuple(y.shape)} for 2 samples", "it must give (2, width)"
            fault = Fault(place, f"its pool {reason}", remedy, f"{name} {reason}, {remedy}")
        if fault is not None:
            faults.append(fault)
        if y is None or (fault is not None and part is trunk.pool):
            failed = min(len(shapes), len(parts) - 1)  # a pool fails as part of the norm before it
            reason = f"not looked at, because the shape of its input is not known, as {names[failed]} fails"
            faults += [Fault(name, reason, f"mend {names[failed]} first") for name in names[failed + 1 :]]
            shapes += [shapes[-1] if shapes else (1,)] * (len(parts) + 1 - len(shapes))
            break
        x = y
        shapes.append(tuple(y.shape[1:]))
    return shapes, faults


def _from_recipe(recipe: Recipe, changes: Mapping[str, Any]) -> Resolved:
    recipe = _changed_recipe(recipe, changes)
    encoders: list[Encoder | ModuleEncoder] = []
    trunks = make_trunks({modality: wanted for modality, wanted in recipe.encoders.items() if wanted.factory}, recipe.seed)
    for modality, wanted in recipe.encoders.items():
        if wanted.factory is None:
            encoders.append(wanted.family_encoder(modality))
            continue
        spec, trunks[modality] = describe_trunk(modality, wanted, trunks[modality])
        encoders.append(spec)
    if recipe.whole_objective.kind == "contrastive" and len(encoders) != 2:
        raise ConfigError(
            f"without `classes` the objective is contrastive, which joins exactly two modalities; {recipe.name!r} has "
            f"{list(recipe.encoders)}: give `classes` (--classes), or a second modality"
        )
    try:
        description = ModelDescription(
            name=recipe.name,
            encoders=tuple(encoders),
            projection=Projection(hidden=recipe.projection.hidden, output=recipe.projection.output),
            objective=recipe.whole_objective,
        )
        stages = make_stages(
            description,
            recipe.strategy,
            recipe.rounds,
            recipe.learning_rate,
            recipe.layers_per_stage,
            recipe.freeze_stems,
            recipe.rate_scales,
            _fixed(trunks),
        )
        plan = Plan(
            name=recipe.name,
            model=description,
            strategy=recipe.strategy,
            stages=stages,
            **{name: getattr(recipe, name) for name in _SAME_IN_A_PLAN},
        )
    except ValidationError as error:
        raise ConfigError(f"the plan of {recipe.name!r}{listed(error, Recipe)}") from error
    model = build_model(description, recipe.seed, trunks)
    return _resolved(plan, model, trunks)


def _fixed(trunks: Mapping[str, Trunk]) -> set[str]:
    """Stems and layers of which the factory has frozen every parameter."""
    parts = [{name: part for name, part in named_parts(m, t).items() if name != norm(m)} for m, t in trunks.items()]
    return {name for chain in parts for name in fixed_in(chain)}


def _resolved(plan: Plan, model: nn.Module, trunks: Mapping[str, Trunk]) -> Resolved:
    return Resolved(
        plan,
        model,
        notes=tuple(note for trunk in trunks.values() for note in trunk.notes),
        rewrites=tuple(rewrite for trunk in trunks.values() for rewrite in trunk.rewrites),
        faults=tuple(fault for trunk in trunks.values() for fault in trunk.faults),
    )


def _recipe_of_factory(source: str, changes: Mapping[str, Any]) -> Recipe:
    """A recipe with what the factory makes: one modality, named by its input, or those of its dict."""
    made = call_factory(source, {}, changes.get("seed", 0))
    with library_errors(f"adapting what {source} makes"):
        module = mended(made) if isinstance(made, nn.Module) else made
        modalities = list(made) if isinstance(made, Mapping) else [_NAMES.get(adapt(module).input.kind, "signal")]
    name = source.partition(":")[2].lower().strip("_")[:32] or "model"
    try:
        return Recipe(name=name, encoders={modality: EncoderRecipe(factory=source) for modality in modalities})
    except ValidationError as error:
        raise ConfigError(f"{source} makes a dict with keys {modalities}{listed(error, Recipe)}") from error


def _changed_recipe(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    values = recipe.model_dump(exclude_unset=True) | {k: v for k, v in changes.items() if k not in _MERGED}
    values |= {key: values.get(key, {}) | dict(changes[key]) for key in _MERGED if key in changes}
    return Recipe.from_json(json.dumps(values), "the plan file with the options of the command")


def _changed_plan(plan: Plan, changes: Mapping[str, Any], source: str) -> Plan:
    """A whole plan with options of the command: the stages are made anew if an option is about them.

    What no option names stays: layers per stage, and rounds and rates of each stage while there are as many stages.
    """
    about_stages = {"strategy", "rounds", "learning_rate", "layers_per_stage", "freeze_stems"} & set(changes)
    others = set(changes) - about_stages - {*_MERGED, "seed", "name"}
    if others:
        raise ConfigError(f"{source} is a whole plan: {sorted(others)[0]!r} is decided in it already; change it there")
    values = plan.model_dump(mode="json")
    values |= {key: changes[key] for key in ("seed", "name") if key in changes}
    for key in _MERGED:
        values[key] = values.get(key, {}) | dict(changes.get(key, {}))
    if about_stages:
        first = plan.stages[0]
        are_as_many = not {"strategy", "layers_per_stage"} & about_stages
        rounds: int | list[int] = [s.rounds for s in plan.stages] if are_as_many else sum(s.rounds for s in plan.stages)
        rates: float | list[float] = [s.learning_rate for s in plan.stages] if are_as_many else first.learning_rate
        layers = {m: sum(name.startswith(f"{m}.layers.") for name in first.active) for m in plan.model.modalities}
        own = 1 if plan.strategy == "end_to_end" else layers
        stages = make_stages(
            plan.model,
            changes.get("strategy", plan.strategy),
            changes.get("rounds", rounds),
            changes.get("learning_rate", rates),
            changes.get("layers_per_stage", own),
            changes.get("freeze_stems", any(name.endswith(".stem") for name in first.frozen)),
            first.rate_scales,
        )
        values |= {
            "strategy": changes.get("strategy", plan.strategy),
            "stages": [stage.model_dump(mode="json") for stage in stages],
        }
    return Plan.from_json(json.dumps(values), "the plan with the options of the command")
