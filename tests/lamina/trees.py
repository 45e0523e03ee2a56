"""Small real data sets on disk: JPEG and PNG files by pillow, WAV files by the standard library, tables, captions."""

import json
import wave
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from edge_client.rows.local_data import LocalData
from lamina.plans.model import (
    AudioFrames,
    Contrastive,
    Encoder,
    Image,
    ImagePatches,
    ModelDescription,
    ModuleEncoder,
    Projection,
    SensorWindows,
    Supervised,
    TextTokens,
    Values,
)

_SIZES = {"width": 4, "heads": 1, "layers": 1}
PICTURE = Encoder(modality="image", input=ImagePatches(channels=3, height=8, width=12, patch=4), **_SIZES)
SOUND = Encoder(modality="audio", input=AudioFrames(frames=5, coefficients=6), **_SIZES)
TEXT = Encoder(modality="text", input=TextTokens(vocabulary=300, length=6), **_SIZES)
MOTION = Encoder(modality="motion", input=SensorWindows(channels=2, samples=8, patch=4), **_SIZES)


def module(modality, form):
    return ModuleEncoder(modality=modality, factory="nets:make", input=form, features=((4,), (4,)), width=4)


WAVEFORM = module("audio", Values(shape=(400,)))
GREY = module("image", Image(channels=1, height=6, width=6))


def make_model(*encoders, classes=2):
    objective = Supervised(classes=classes) if classes else Contrastive()
    return ModelDescription(name="m", encoders=encoders, projection=Projection(hidden=4, output=4), objective=objective)


def write_image(path: Path, seed=0, size=(24, 16), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "I;16": 1}[mode]
    top, dtype = (65535, np.uint16) if mode == "I;16" else (255, np.uint8)
    values = np.random.default_rng(seed).integers(0, top, (size[1], size[0], channels)).astype(dtype)
    Pillow.fromarray(values[..., 0] if channels == 1 else values).save(path)
    return path


def write_sound(path: Path, samples=800, rate=16000, channels=1, width=2, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(-20000, 20000, (samples, channels)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(values.tobytes() if width == 2 else values.astype(np.uint8).tobytes())
    return values


def write_table(folder: Path, columns, rows, name="examples.csv"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]) + "\n", "utf-8")
    return folder


def photo_folder(folder: Path, count=10):
    """`count` images of the classes cat and dog, in turn."""
    rows = []
    for index in range(count):
        file = f"photos/{index}.{'png' if index % 3 else 'jpg'}"
        write_image(folder / file, seed=index)
        rows.append((file, ("cat", "dog")[index % 2]))
    return write_table(folder, ("file", "label"), rows)


def advance_tree(root: Path, roots=("vision", "sound"), per_class=5):
    for label in ("beach", "sports land"):
        for index in range(per_class):
            stem = f"{7000 + index // 2:05d}_{index % 2}"
            write_image(root / roots[0] / label / f"{stem}.jpg", seed=index)
            write_sound(root / roots[1] / label / f"{stem}.wav", seed=index)
    (root / roots[0] / ".DS_Store").write_bytes(b"x")
    return root


def coco_tree(root: Path, count=6):
    images, notes = [], []
    for index in range(count):
        number = 1000 + 7 * index
        file = f"{number:012d}.jpg"
        write_image(root / "train2017" / file, seed=index, mode="L" if index == 2 else "RGB")
        images.append({"id": number, "file_name": file, "width": 24, "height": 16, "license": 1})
        notes += [{"id": 50 * index + k, "image_id": number, "caption": f"  Photo {index} seen {k}\n"} for k in range(3)]
    (root / "annotations").mkdir()
    (root / "annotations" / "captions_train2017.json").write_text(json.dumps({"images": images, "annotations": notes[::-1]}))
    return root


def opened(path: Path, model, scratch: Path) -> LocalData:
    """As a device opens and checks it."""
    data = LocalData(path, scratch)
    data.check(model)
    return data


def values(data: LocalData, split, name):
    return data.rows(split, name).take(range(data.examples(split)))
