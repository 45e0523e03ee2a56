"""A recipe: a plan file as people write it, in TOML, YAML or JSON. `export.plans.resolve` makes a plan of it.

    name = "birds"
    classes = 20

    [encoders.image]
    factory = "timm:create_model"
    arguments = { model_name = "vit_tiny_patch16_224" }

A file with `stages` is a whole plan (`lamina.plans.plan.Plan`) and is taken as it is. docs/export.md has every key of a recipe.
"""

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from lamina.bounds import MAX_ROUNDS
from lamina.data.card import DataCard
from lamina.errors import ConfigError
from lamina.federation.rules import AnyRule, Mean
from lamina.plans.model import (
    FACTORY,
    Contrastive,
    Encoder,
    FamilyInput,
    ModelDescription,
    Name,
    Objective,
    Positive,
    Projection,
    Supervised,
)
from lamina.plans.plan import Calibration, Cohort, Plan, PositiveFloat, SelfTuning, StrategyName, Training
from lamina.record import Record, listed


class EncoderRecipe(Record):
    """One modality: a factory of the user's (`factory`, `arguments`, `options`), or sizes of the built-in family.

    `layers` are all that the factory makes, unless it says fewer.
    """

    factory: Annotated[str, Field(pattern=FACTORY)] | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    input: FamilyInput | None = None
    width: Positive | None = None
    heads: Positive | None = None
    layers: Positive | None = None
    mlp_ratio: Positive = 4

    @model_validator(mode="after")
    def _is_one_of_two(self) -> "EncoderRecipe":
        sizes = (self.input, self.width, self.heads)
        if self.factory and any(value is not None for value in sizes):
            raise ValueError("input, width and heads are those of the built-in family; a factory's model brings its own")
        if not self.factory and any(value is None for value in (*sizes, self.layers)):
            raise ValueError("give a factory, or input, width, heads and layers of the built-in family")
        return self

    def family_encoder(self, modality: str) -> Encoder:
        """The encoder of the built-in family that this describes; it has no factory."""
        assert self.input and self.width and self.heads and self.layers
        return Encoder(
            modality=modality,
            input=self.input,
            width=self.width,
            heads=self.heads,
            layers=self.layers,
            mlp_ratio=self.mlp_ratio,
        )


class ProjectionRecipe(Record):
    """Width of the hidden layer (absent: a single Linear) and of the embedding."""

    hidden: Positive | None = None
    output: Positive = 64


class Recipe(Record):
    """What a plan needs, in few words. With `classes` the objective is supervised, without it contrastive; `objective` says it
    in full instead. Keys that a plan has too mean the same.

    `rounds` and `learning_rate` are one value or one for each stage; a single number of rounds is the total.
    `freeze_stems` leaves the stems as the factories made them, in every stage.
    """

    name: Name
    encoders: Annotated[dict[Name, EncoderRecipe], Field(min_length=1)]
    classes: Annotated[int, Field(ge=2)] | None = None
    temperature: Annotated[float, Field(gt=0, le=1)] = 0.05
    objective: Objective | None = None
    projection: ProjectionRecipe = ProjectionRecipe(hidden=128)
    strategy: StrategyName = "layerwise"
    layers_per_stage: Positive | dict[Name, Positive] = 1
    rounds: (
        Annotated[int, Field(ge=1, le=MAX_ROUNDS)]
        | Annotated[tuple[Annotated[int, Field(ge=0, le=MAX_ROUNDS)], ...], Field(min_length=1)]
    ) = 12
    learning_rate: PositiveFloat | Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = 1e-3
    rate_scales: dict[str, PositiveFloat] = Field(default_factory=dict)
    freeze_stems: bool = False
    training: Training = Training()
    cohort: Cohort = Cohort()
    self_tuning: SelfTuning | None = None
    calibration: Calibration | None = None
    device_modalities: tuple[tuple[Name, ...], ...] = ()
    zero_init: bool = False
    aggregation: AnyRule = Mean()
    server_learning_rate: PositiveFloat = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data_card: DataCard | None = None

    @model_validator(mode="after")
    def _says_the_objective_once(self) -> "Recipe":
        if self.objective is not None and ({"classes", "temperature"} & self.model_fields_set):
            raise ValueError("objective says it all: move classes and temperature into it")
        return self

    @property
    def whole_objective(self) -> Objective:
        """The objective, in full or by `classes`."""
        if self.objective is not None:
            return self.objective
        return Contrastive(temperature=self.temperature) if self.classes is None else Supervised(classes=self.classes)

    def family_model(self) -> ModelDescription | None:
        """The model, where no factory has to be called to know it; None where one has."""
        if any(encoder.factory for encoder in self.encoders.values()):
            return None
        return ModelDescription(
            name=self.name,
            encoders=tuple(encoder.family_encoder(modality) for modality, encoder in self.encoders.items()),
            projection=Projection(hidden=self.projection.hidden, output=self.projection.output),
            objective=self.whole_objective,
        )


SUFFIXES = (".toml", ".yaml", ".yml", ".json")


def read_recipe(path: Path) -> Recipe | Plan:
    """Reads a plan file by its suffix: .toml, .yaml, .yml or .json.

    Raises ConfigError that names the file and the line or the key; for a misspelled key, the nearest right one.
    """
    values = parse_plan_file(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not keys with values; docs/export.md shows a plan file")
    kind: type[Recipe] | type[Plan] = Plan if "stages" in values else Recipe
    # By way of JSON: lists become tuples, and a date or another value that JSON lacks is refused.
    try:
        text = json.dumps(values, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; a plan holds numbers, texts, lists and tables only") from error
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{path} is not a valid {kind.__name__}{listed(error, kind)}") from error


def parse_plan_file(path: Path) -> Any:
    """What a plan file holds, by its suffix. Raises ConfigError that names the file and, for what cannot be read, the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder; give a plan file, .toml, .yaml or .json") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text file: {error}") from error
    try:
        if path.suffix == ".toml":
            return tomllib.loads(text)
        if path.suffix in (".yaml", ".yml"):
            return _parse_yaml(text)
        if path.suffix == ".json":
            return json.loads(text)
    except ValueError as error:  # both parsers name line and column
        raise ConfigError(f"{path} cannot be read: {error}") from error
    raise ConfigError(f"{path} is no plan file: its name must end with .toml, .yaml, .yml or .json")


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
