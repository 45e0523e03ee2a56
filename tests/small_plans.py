"""Small plans of every strategy, objective and kind of input, and their bundles, exported once for all test processes."""

import fcntl
import os
from pathlib import Path
from typing import get_args

from lamina.bundles.bundle import MANIFEST, read_bundle
from lamina.bundles.manifest import Manifest
from lamina.plans.model import (
    AudioFrames,
    Contrastive,
    Encoder,
    ImagePatches,
    ModelDescription,
    ModuleEncoder,
    Projection,
    SensorWindows,
    Supervised,
    TextTokens,
)
from lamina.plans.plan import Plan, StrategyName, Training
from lamina.plans.strategies import make_stages

MAX_BATCH = 4
_IMAGE = ImagePatches(channels=3, height=8, width=8, patch=4)
# The second modality has one layer, so that its second stage has no active layer at all.
_SIZES = {"width": 16, "heads": 2, "layers": 2}
_PROJECTION = Projection(hidden=16, output=8)

SUPERVISED = ModelDescription(
    name="supervised",
    encoders=(
        Encoder(modality="image", input=_IMAGE, **_SIZES),
        Encoder(modality="audio", input=AudioFrames(frames=5, coefficients=6), **(_SIZES | {"layers": 1})),
    ),
    projection=_PROJECTION,
    objective=Supervised(classes=4),
)
CONTRASTIVE = ModelDescription(
    name="contrastive",
    encoders=(
        Encoder(modality="image", input=_IMAGE, **_SIZES),
        Encoder(modality="text", input=TextTokens(vocabulary=11, length=6), **(_SIZES | {"layers": 1})),
    ),
    projection=_PROJECTION,
    objective=Contrastive(temperature=0.1),
)
SENSORS = ModelDescription(
    name="sensors",
    encoders=(Encoder(modality="motion", input=SensorWindows(channels=2, samples=12, patch=4), **_SIZES),),
    projection=_PROJECTION,
    objective=Supervised(classes=3),
)

# Layers of a user's own module, joined by gates.
GATED = ModelDescription(
    name="gated",
    encoders=(
        ModuleEncoder(
            modality="text",
            factory="tests.export.user_models:words",
            options={"gated": True},
            input=TextTokens(vocabulary=13, length=4),
            features=((4, 8),) * 3,
            width=8,
        ),
    ),
    projection=_PROJECTION,
    objective=Supervised(classes=3),
)

# One layer each: what micro-batches add to a contrastive step does not depend on the depth, and lowering takes time.
PAIR = CONTRASTIVE.model_copy(
    update={"name": "pair", "encoders": tuple(e.model_copy(update={"layers": 1}) for e in CONTRASTIVE.encoders)}
)


def make_plan(model: ModelDescription, strategy: str = "layerwise", suffix: str = "", **training: object) -> Plan:
    settings = Training(**({"batch_size": MAX_BATCH} | training))
    stages = make_stages(model, strategy, rounds=4, learning_rate=0.1)
    return Plan(name=f"{model.name}_{strategy}{suffix}", model=model, strategy=strategy, stages=stages, training=settings)


PLANS = {
    plan.name: plan
    for plan in (
        make_plan(SUPERVISED),
        make_plan(GATED),
        # Deep stages of one modality for the supervised objective, and of two for the other: they take longest to lower.
        *(make_plan(model, strategy) for model in (CONTRASTIVE, SENSORS) for strategy in get_args(StrategyName)),
    )
}
# A batch of 7 in micro-batches of 4: the programs are those of a batch of 4.
SUPERVISED_MICRO = make_plan(SENSORS, suffix="_micro", batch_size=2 * MAX_BATCH - 1, micro_batch=MAX_BATCH)
# A batch of 4 in micro-batches of 1, 2, and 3 (the last one then has 1 sample).
CONTRASTIVE_MICRO = {size: make_plan(PAIR, "end_to_end", f"_micro{size}", micro_batch=size) for size in (1, 2, 3)}
INT8_PREFIX = make_plan(SUPERVISED, suffix="_int8", prefix_precision="int8")


def shared_bundle(plan: Plan, engines: tuple[str, ...], folder: Path, cache: Path) -> tuple[Path, Manifest]:
    """The bundle of a plan in `folder`; the first process that asks exports it, the others wait."""
    from export.build import export_bundle

    name = "_".join((plan.name, *engines))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / name / MANIFEST).exists():
            # Beside another test process, a second one that lowers only starts the compilers once more.
            workers = 1 if "PYTEST_XDIST_WORKER" in os.environ else None
            export_bundle(plan, folder / name, engines, cache=cache, workers=workers)
    return folder / name, read_bundle(folder / name)
