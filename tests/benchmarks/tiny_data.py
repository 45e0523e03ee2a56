"""Models and data of the tests of `benchmarks.methods`: so small that a whole run takes seconds."""

import numpy as np

from benchmarks.methods.data_sets import Loaded
from lamina.plans.model import AudioFrames, Contrastive, Encoder, ModelDescription, Projection, Supervised

SIZES = {"width": 8, "heads": 1, "layers": 2}
FRAMES = AudioFrames(frames=3, coefficients=4)
TINY = ModelDescription(
    name="tiny",
    encoders=(Encoder(modality="audio", input=FRAMES, **SIZES),),
    projection=Projection(hidden=8, output=4),
    objective=Supervised(classes=3),
)
PAIR = ModelDescription(
    name="pair",
    encoders=(
        Encoder(modality="image", input=FRAMES, **(SIZES | {"layers": 1})),
        Encoder(modality="text", input=FRAMES, **(SIZES | {"layers": 1})),
    ),
    projection=Projection(hidden=8, output=4),
    objective=Contrastive(temperature=0.1),
)


def load_tiny(seed: int, count: int = 60) -> Loaded:
    """Three classes whose means lie far apart, and two owners."""
    rng = np.random.default_rng(seed)
    mean = np.random.default_rng(99).normal(size=(3, 3, 4)) * 2
    parts = []
    for rows in (count, count // 2):
        label = rng.integers(0, 3, rows)
        parts.append({"audio": (mean[label] + rng.normal(size=(rows, 3, 4))).astype(np.float32), "label": label})
    return Loaded(*parts, owner=np.arange(count) % 2)


def load_pairs(seed: int) -> Loaded:
    """The text is the image with noise; 12 test groups of two."""
    rng = np.random.default_rng(seed)
    parts = []
    for rows in (40, 24):
        image = rng.normal(size=(rows // 2, 3, 4)).repeat(2, axis=0).astype(np.float32)
        parts.append({"image": image, "text": image.copy()})
    return Loaded(*parts, owner=np.arange(40) % 2, test_groups=np.arange(24) // 2)
