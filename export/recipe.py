"""Plan files and factories -> a plan and the model that it starts from.

birds.toml, plan.json       a recipe (`lamina.recipe`) or a whole plan
my_models:make_vit          a factory alone: everything else by default, or by the options of the command
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from export.adapters import adapt
from export.cut import check_tensors, run_segment
from export.factory import call_factory
from export.faults import Faults, adapt_faulty, mended, named_parts
from export.inputs import example_inputs, raw_input
from export.models import adapt_made, build_model, make_trunk
from export.parameters import fixed_in
from export.trunk import Trunk
from lamina.errors import ConfigError, CutError
from lamina.manifest import Rewrite
from lamina.model import Encoder, ModelDescription, ModuleEncoder, Projection, Supervised
from lamina.plan import Plan
from lamina.recipe import EncoderRecipe, Recipe, read_recipe
from lamina.record import listed
from lamina.segments import norm, projection
from lamina.strategies import freeze_fixed, make_stages

_MERGED = ("training", "cohort")
_SAME_IN_A_PLAN = (
    "training",
    "cohort",
    "self_tuning",
    "calibration",
    "device_modalities",
    "zero_init",
    "server_learning_rate",
    "seed",
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

    `notes` are the adapters' remarks; `rewrites` what was replaced in the user's modules before the export. `faults` is empty
    unless the model was read without checks: no export takes such a model.
    """

    plan: Plan
    model: nn.Module
    notes: tuple[str, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    faults: Mapping[str, Exception] = field(default_factory=dict)


def resolve(source: str, changes: Mapping[str, Any] | None = None, *, check: bool = True) -> Resolved:
    """Reads a plan file, or calls a factory. `changes` replace keys of the recipe (`training` and `cohort` are merged key by
    key).

    Without `check`, a faulty layer does not end the reading, so that `export.doctor` can look at the others: its fault is in
    `faults`, and tensors of another precision or device are float32 on the CPU in the model.

    Raises ConfigError for a file or key that is wrong, ExportError for a factory that raises, CutError for a model that does
    not fit.
    """
    changes = {key: value for key, value in (changes or {}).items() if value is not None}
    faults: Faults | None = None if check else {}
    if is_factory(source):
        return _from_recipe(_recipe_of_factory(source, changes, check), changes, faults)
    found = read_recipe(Path(source))
    if isinstance(found, Plan):
        plan = _changed_plan(found, changes, source)
        own = [encoder for encoder in plan.model.encoders if isinstance(encoder, ModuleEncoder)]
        trunks = {e.modality: make_trunk(e, plan.seed) if faults is None else _read_trunk(e, plan.seed, faults) for e in own}
        model = build_model(plan.model, plan.seed, trunks)
        return _resolved(freeze_fixed(plan, _fixed(trunks)), model, trunks, faults)
    return _from_recipe(found, changes, faults)


def is_factory(source: str) -> bool:
    """Whether the text names a function rather than a file."""
    return ":" in source and not Path(source).exists() and "/" not in source and "\\" not in source


def describe_trunk(
    modality: str, recipe: EncoderRecipe, trunk: Trunk, faults: Faults | None = None
) -> tuple[ModuleEncoder, Trunk]:
    """The description of a trunk, by running it on two random samples; and the trunk with the layers that are wanted.

    With `faults`, a segment that fails is no error: those behind it, whose input nobody knows, are added there, and the
    description repeats the last shape that is known.
    """
    where = f"{recipe.factory} ({modality})"
    count = recipe.layers or len(trunk.layers)
    if not trunk.layers:
        raise CutError(f"{where} has no layers: a strategy needs at least one to train")
    if count > len(trunk.layers):
        raise ConfigError(f"{where} has {len(trunk.layers)} layers, the plan wants {count}")
    trunk = replace(trunk, layers=trunk.layers[:count])
    parts = named_parts(modality, trunk)
    if faults is None:
        check_tensors(nn.ModuleList(parts.values()))
    spec = ModuleEncoder(
        modality=modality,
        factory=recipe.factory or "",
        arguments=recipe.arguments,
        options=recipe.options,
        input=trunk.input,
        features=((1,),) * (count + 1),
        width=1,
    )
    shapes: list[tuple[int, ...]] = []
    try:
        for shape in _shapes(spec, parts, trunk.pool):
            shapes += [shape]
    except CutError:
        if faults is None:
            raise
        _add_unknown(faults, [*parts, projection(modality)], len(shapes))
        shapes += [shapes[-1] if shapes else (1,)] * (len(parts) + 1 - len(shapes))
    return spec.model_copy(update={"features": tuple(shapes[: count + 1]), "width": shapes[-1][-1]}), trunk


def _shapes(spec: ModuleEncoder, parts: Mapping[str, nn.Module], pool: nn.Module) -> Iterator[tuple[int, ...]]:
    """What each part and at last the pool give for one example. Raises CutError at the first that fails."""
    random = ModelDescription(
        name="probe", encoders=(spec,), projection=Projection(hidden=1, output=1), objective=Supervised(classes=2)
    )
    (x,) = example_inputs(random, (raw_input(spec),), 2)
    for name, part in parts.items():
        x = run_segment(name, part.eval(), x)
        if x.ndim < 2 or x.shape[0] != 2:
            raise CutError(f"{name} gives shape {tuple(x.shape)} for 2 samples; a segment keeps the batch as its first axis")
        yield tuple(x.shape[1:])
    pooled = run_segment(f"{spec.modality}.pool", pool.eval(), x)
    if pooled.ndim != 2 or pooled.shape[0] != 2:
        raise CutError(f"{spec.modality}.pool gives shape {tuple(pooled.shape)} for 2 samples, it must give (2, width)")
    yield tuple(pooled.shape[1:])


def _add_unknown(faults: Faults, names: list[str], failed: int) -> None:
    """Adds the segments behind the one that failed; a pool fails as part of the norm before it."""
    failed = min(failed, len(names) - 2)
    for name in names[failed + 1 :]:
        unknown = CutError(
            f"not looked at, because the shape of its input is not known, as {names[failed]} fails: mend {names[failed]} first"
        )
        faults.setdefault(name, unknown)


def _read_trunk(spec: ModuleEncoder, seed: int, faults: Faults) -> Trunk:
    """As `make_trunk`, with the faults of its segments in `faults`."""
    made = call_factory(spec.factory, spec.arguments, seed)
    trunk = adapt_faulty(made, spec.modality, spec.factory, spec.options, faults)
    return replace(trunk, layers=trunk.layers[: spec.layers])


def _from_recipe(recipe: Recipe, changes: Mapping[str, Any], faults: Faults | None) -> Resolved:
    recipe = _changed_recipe(recipe, changes)
    encoders: list[Encoder | ModuleEncoder] = []
    trunks: dict[str, Trunk] = {}
    for modality, wanted in recipe.encoders.items():
        if wanted.factory is None:
            encoders.append(wanted.family_encoder(modality))
            continue
        made = call_factory(wanted.factory, wanted.arguments, recipe.seed)
        if faults is None:
            trunk = adapt_made(made, modality, wanted.factory, wanted.options)
        else:
            trunk = adapt_faulty(made, modality, wanted.factory, wanted.options, faults)
        spec, trunks[modality] = describe_trunk(modality, wanted, trunk, faults)
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
    return _resolved(plan, model, trunks, faults)


def _fixed(trunks: Mapping[str, Trunk]) -> set[str]:
    """Stems and layers of which the factory has frozen every parameter."""
    parts = [{name: part for name, part in named_parts(m, t).items() if name != norm(m)} for m, t in trunks.items()]
    return {name for chain in parts for name in fixed_in(chain)}


def _resolved(plan: Plan, model: nn.Module, trunks: Mapping[str, Trunk], faults: Faults | None) -> Resolved:
    notes = tuple(note for trunk in trunks.values() for note in trunk.notes)
    return Resolved(plan, model, notes, tuple(each for trunk in trunks.values() for each in trunk.rewrites), faults or {})


def _recipe_of_factory(source: str, changes: Mapping[str, Any], check: bool) -> Recipe:
    """A recipe with what the factory makes: one modality, named by its input, or those of its dict."""
    made = call_factory(source, {}, changes.get("seed", 0))
    if isinstance(made, nn.Module) and not check:
        made = mended(made)
    modalities = list(made) if isinstance(made, Mapping) else [_NAMES.get(adapt(made).input.kind, "signal")]
    name = source.partition(":")[2].lower().strip("_")[:32] or "model"
    return Recipe(name=name, encoders={modality: EncoderRecipe(factory=source) for modality in modalities})


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
