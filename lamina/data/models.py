"""Which model the data is for: read from a plan, or from the bundle that was made of it."""

from pathlib import Path

from lamina.bundle import MANIFEST
from lamina.errors import ConfigError
from lamina.manifest import Manifest
from lamina.model import ModelDescription
from lamina.plan import Plan
from lamina.recipe import read_recipe


def load_model(path: Path) -> ModelDescription:
    """The model of a whole plan file, of a bundle folder, or of a bundle's manifest.json.

    Only the manifest of a bundle is read, not its blobs. Raises ConfigError for anything else.
    """
    if path.is_dir():
        if not (path / MANIFEST).is_file():
            raise ConfigError(f"{path} is a folder without {MANIFEST}, so it is no bundle; --for takes a plan file or a bundle")
        return Manifest.from_file(path / MANIFEST).plan.model
    if path.name == MANIFEST:
        return Manifest.from_file(path).plan.model
    found = read_recipe(path)
    if isinstance(found, Plan):
        return found.model
    raise ConfigError(f"{path} does not say yet what shape an example has: give the bundle that `lamina export` made of it")
