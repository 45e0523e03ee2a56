"""Which model the data is for: read from a plan file, or from the bundle that was made of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from lamina.bundles.bundle import MANIFEST
from lamina.bundles.manifest import Manifest
from lamina.data.card import DataCard
from lamina.errors import ConfigError
from lamina.plans.model import ModelDescription
from lamina.plans.plan import Plan
from lamina.plans.recipe import read_recipe
from lamina.record import explain

CallFactories = Callable[[Path], ModelDescription]


@dataclass(frozen=True)
class Target:
    """The model that data is for, and what its plan says that the data of all devices has in common."""

    model: ModelDescription
    card: DataCard | None = None


def load_target(path: Path, call_factories: CallFactories | None = None) -> Target:
    """What a plan file, a bundle folder or a bundle's manifest.json says.

    Only the manifest of a bundle is read, not its blobs. The shapes of one's own modules are known only where they are made: a
    recipe that names some is handed to `call_factories`. Raises ConfigError for anything else.
    """
    if path.is_dir():
        if not (path / MANIFEST).is_file():
            raise ConfigError(f"{path} is a folder without {MANIFEST}, so it is no bundle; --for takes a plan file or a bundle")
        return _of_manifest(path / MANIFEST)
    if path.name == MANIFEST:
        return _of_manifest(path)
    plan = read_recipe(path)
    if isinstance(plan, Plan):
        return Target(plan.model, plan.data_card)
    try:
        model = plan.family_model()
    except ValidationError as error:
        raise ConfigError(f"the model of {path}: {explain(error)}") from error
    if model is not None:
        return Target(model, plan.data_card)
    if call_factories is None:
        raise ConfigError(f"{path} does not say yet what shape an example has: give the bundle that `lamina export` made of it")
    return Target(call_factories(path), plan.data_card)


def load_model(path: Path, call_factories: CallFactories | None = None) -> ModelDescription:
    """The model of `load_target`."""
    return load_target(path, call_factories).model


def _of_manifest(path: Path) -> Target:
    plan = Manifest.from_file(path).plan
    return Target(plan.model, plan.data_card)
