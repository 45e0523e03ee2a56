"""COCO captions: a JSON file of images and annotations, joined on image_id, and a folder of images.

`file_name` says which file an image is. A model of one image and one text input takes it; labels there are none.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from lamina.data.convert import IMAGES
from lamina.data.faults import Faults
from lamina.data.items import Item
from lamina.errors import DataError
from lamina.plans.model import ModelDescription

Caption = Literal["first", "all", "random"]


class CocoSource:
    """Holds the whole JSON file while it is read; the 92 MB of COCO 2017 take several hundred MiB of memory."""

    def __init__(
        self,
        root: Path,
        parts: Sequence[tuple[Path | None, Path | None, str]],
        model: ModelDescription,
        caption: Caption,
        seed: int,
    ) -> None:
        """`parts` are (captions, images, split), paths relative to `root` or to the current folder. Raises DataError."""
        inputs = {encoder.modality: encoder.input.kind for encoder in model.encoders}
        images = [name for name, kind in inputs.items() if kind in IMAGES]
        texts = [name for name, kind in inputs.items() if kind == "text_tokens"]
        other = sorted(set(inputs) - set(images[:1]) - set(texts[:1]))
        if other:
            raise DataError(
                f"COCO captions have one image and one text, the model also takes {other[0]!r}: bring a table instead"
            )
        if model.labels is not None:
            raise DataError("COCO captions have no labels, and the model's objective needs them: bring a table with labels")
        self._image, self._text = next(iter(images), None), next(iter(texts), None)
        self._caption, self._seed = caption, seed
        folder = root.parent if root.is_file() else root
        given = [part for part in parts if part[0] is not None]
        if not given:
            if root.is_dir():
                raise DataError(f"name the captions of {root}, such as --captions annotations/captions_train2017.json")
            given = [(root.absolute(), parts[0][1], "train")]
        self._parts = [
            (_find(captions, folder, "--captions"), _find(where, folder, "--images"), split) for captions, where, split in given
        ]
        self._has_test = any(split == "test" for *_, split in self._parts)

    @property
    def words(self) -> str:
        return f"COCO captions {', '.join(str(captions) for captions, *_ in self._parts)}, caption {self._caption}"

    @property
    def labels(self) -> Counter[str] | None:
        return None

    def count(self) -> int | None:
        return None

    def items(self, faults: Faults) -> Iterator[Item]:
        for captions, folder, split in self._parts:
            yield from self._part(captions, folder, split if self._has_test else None, faults)

    def _part(self, captions: Path, folder: Path, split: str | None, faults: Faults) -> Iterator[Item]:
        images, texts = _read(captions, faults)
        names = {entry.name for entry in folder.iterdir()}
        missing = [name for name in images.values() if "/" not in name and name not in names]
        if missing:
            faults.add(
                str(folder), f"{len(missing)} of {len(images)} image files are missing, the first is {missing[0]}", len(missing)
            )
        gone = set(missing)
        for number, file in images.items():
            if file in gone:
                continue
            if number not in texts:
                faults.add(f"{captions.name}, image {number} ({file})", "has no caption", items_left_out=1)
                continue
            for place, text in self._chosen(number, texts[number]):
                values: dict[str, Any] = {}
                if self._image:
                    values[self._image] = folder / file
                if self._text:
                    values[self._text] = text
                yield Item(f"{file}, caption {place}", values, split=split, group=str(number))

    def _chosen(self, number: int, texts: list[str]) -> list[tuple[int, str]]:
        if self._caption == "all":
            return list(enumerate(texts))
        # A generator for each image: which caption it gets does not depend on the images beside it.
        place = random.Random(f"{self._seed}/{number}").randrange(len(texts)) if self._caption == "random" else 0
        return [(place, texts[place])]


def _read(path: Path, faults: Faults) -> tuple[dict[int, str], dict[int, list[str]]]:
    """File name and captions (stripped, in the order of their ids) for each image id."""
    try:
        whole = json.loads(path.read_bytes())
        listed = [(image["id"], image["file_name"]) for image in whole["images"]]
        notes = sorted((note["id"], note["image_id"], note["caption"]) for note in whole["annotations"])
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no JSON file: {error}") from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is no COCO captions file: {error} is missing or of another form") from error
    for number, times in Counter(number for number, _ in listed).items():
        if times > 1:
            faults.add(f"{path.name}, image {number}", f"its id stands {times} times in `images`", times - 1)
    images = dict(listed)
    texts: dict[int, list[str]] = {}
    for note, number, caption in notes:
        if number not in images:
            faults.add(f"{path.name}, annotation {note}", f"names image {number}, which is not in `images`")
        elif not str(caption).strip():
            faults.add(f"{path.name}, annotation {note} of {images[number]}", "the caption is empty")
        else:
            texts.setdefault(number, []).append(" ".join(str(caption).split()))
    return images, texts


def _find(path: Path | None, folder: Path, option: str) -> Path:
    if path is None:
        raise DataError(f"{option} is missing: captions and images are given together")
    for found in (folder / path, path):
        if found.exists():
            return found
    raise DataError(f"{option} {path} exists neither in {folder} nor in the current folder")
