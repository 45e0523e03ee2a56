"""The forms in which a data set may lie there, and how one is told from the other."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from lamina.data.items import Source
from lamina.data.sources.arrays import ArraySource
from lamina.data.sources.coco import Caption, CocoSource
from lamina.data.sources.folder import FolderSource
from lamina.data.sources.paired import PairedSource
from lamina.data.sources.python_class import NAME, ClassSource
from lamina.data.tables import SUFFIXES
from lamina.errors import DataError
from lamina.plans.model import ModelDescription

Kind = Literal["folder", "arrays", "class", "coco", "advance"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class SourceSettings:
    """`names` says what the source calls a modality of the model, where it calls it otherwise."""

    names: Mapping[str, str] = field(default_factory=dict)
    captions: Path | None = None
    images: Path | None = None
    test_captions: Path | None = None
    test_images: Path | None = None
    caption: Caption = "first"
    seed: int = 0


def find_kind(source: str, settings: SourceSettings) -> Kind:
    """Raises DataError for what does not exist or may be several things."""
    path = Path(source)
    if not path.exists():
        if NAME.fullmatch(source):
            return "class"
        raise DataError(f"{source} does not exist; a source is a file, a folder, or a Python class as package.module:Name")
    if settings.captions is not None or path.suffix == ".json":
        return "coco"
    if path.is_file():
        if path.suffix in (".npz", ".npy"):
            return "arrays"
        if path.suffix.lower() in SUFFIXES:
            return "folder"
        raise DataError(f"{source} is no source: files are .npz, .npy, .csv, .tsv or .json (captions)")
    endings = {entry.suffix.lower() for entry in path.iterdir() if entry.is_file() and not entry.name.startswith(".")}
    if endings & set(SUFFIXES):
        return "folder"
    if ".npy" in endings:
        return "arrays"
    if any(entry.is_dir() and not entry.name.startswith(".") for entry in path.iterdir()):
        return "advance"
    raise DataError(f"{source} has no CSV table, no .npy arrays and no class folders; name its --kind: {', '.join(KINDS)}")


def open_source(source: str, kind: Kind, model: ModelDescription, settings: SourceSettings) -> Source:
    """Raises DataError for a source without a modality that the model has, naming it."""
    if kind == "class":
        return ClassSource(source, model, settings.names)
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source} does not exist")
    if kind == "arrays":
        return ArraySource(path, model, settings.names)
    if kind == "folder":
        return FolderSource(path, model, settings.names)
    if kind == "advance":
        return PairedSource(path, model, settings.names)
    parts = [(settings.captions, settings.images, "train"), (settings.test_captions, settings.test_images, "test")]
    return CocoSource(path, parts, model, settings.caption, settings.seed)
