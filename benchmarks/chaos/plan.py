"""The run that is disturbed: rounds of less than a second, with everything that leaves a trace on disk or on the wire."""

from pathlib import Path

import numpy as np

from lamina.plans.model import Encoder, ImagePatches, ModelDescription, Projection, Supervised
from lamina.plans.plan import AdamW, Cohort, FeatureStore, Plan, Training
from lamina.plans.strategies import make_stages

ENGINE = "onnxruntime"
_CLASSES = 4
_IMAGE = ImagePatches(channels=3, height=8, width=8, patch=4)


def small_plan(devices: int, layers: int, rounds: int) -> Plan:
    """`layers` stages of `rounds` rounds each: int8 and zstd up, fp16 down, int8 features, moments kept between rounds.

    A round needs the updates of all devices, so that the same updates are in its mean however they are disturbed.
    """
    model = ModelDescription(
        name="chaos",
        encoders=(Encoder(modality="image", input=_IMAGE, width=16, heads=2, layers=layers),),
        projection=Projection(hidden=16, output=8),
        objective=Supervised(classes=_CLASSES),
    )
    return Plan(
        name="chaos",
        model=model,
        strategy="layerwise",
        stages=make_stages(model, "layerwise", rounds=[rounds] * layers, learning_rate=0.003),
        training=Training(
            batch_size=8,
            micro_batch=4,
            local_epochs=4,
            optimizer=AdamW(),
            keep_optimizer=True,
            features=FeatureStore(encoding="int8"),
            download_encoding="fp16",
            upload_encoding="int8",
            compression="zstd",
        ),
        cohort=Cohort(size=devices, min_updates=devices, evaluate_every=2),
    )


def write_data(plan: Plan, folder: Path) -> list[Path]:
    """One file for each device of the cohort, with 60 to 90 training examples and 20 for the test."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(plan.seed)
    means = random.normal(size=(_CLASSES, *_IMAGE.shape))
    paths = []
    for device in range(plan.cohort.size):
        arrays = {}
        for split, count in (("train", 60 + 10 * (device % 4)), ("test", 20)):
            label = random.integers(0, _CLASSES, count)
            arrays[f"{split}_label"] = label.astype(np.int64)
            arrays[f"{split}_image"] = (0.3 * means[label] + random.normal(size=(count, *_IMAGE.shape))).astype(np.float32)
        paths.append(folder / f"device-{device}.npz")
        np.savez(paths[-1], **arrays)
    return paths
