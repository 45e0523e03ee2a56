"""Models for the tests of this room, small enough to count by hand."""

from pathlib import Path

import torch
from torch import nn

from export.build import export_bundle
from export.models.models import MultimodalModel, build_model
from lamina.bundles.manifest import EngineName, Manifest
from lamina.plans.model import AudioFrames, Contrastive, Encoder, ModelDescription, Projection, SensorWindows, Supervised
from lamina.plans.plan import Plan, Training
from lamina.plans.strategies import make_stages

WIDTH, HEADS, TOKENS, LAYERS, CLASSES, HIDDEN, OUTPUT, COEFFICIENTS, BATCH = 16, 2, 4, 3, 3, 8, 6, 5, 4
SIZES = {"width": WIDTH, "heads": HEADS, "layers": LAYERS}
AUDIO = Encoder(modality="audio", input=AudioFrames(frames=TOKENS, coefficients=COEFFICIENTS), **SIZES)
MOTION = Encoder(modality="motion", input=SensorWindows(channels=2, samples=TOKENS * 3, patch=3), **SIZES)


def describe(*encoders: Encoder) -> ModelDescription:
    return ModelDescription(
        name="tiny",
        encoders=encoders,
        projection=Projection(hidden=HIDDEN, output=OUTPUT),
        objective=Supervised(classes=CLASSES),
    )


ONE, TWO = describe(AUDIO), describe(AUDIO, MOTION)
# Two layers each: what a second stage adds can be seen, and tracing is quick.
SHALLOW = describe(*(encoder.model_copy(update={"layers": 2}) for encoder in TWO.encoders))
PAIR = SHALLOW.model_copy(update={"objective": Contrastive(temperature=0.1)})


def plan_of(model: ModelDescription = ONE, strategy: str = "layerwise", **training: object) -> Plan:
    stages = make_stages(model, strategy, rounds=3, learning_rate=0.1)
    return Plan(
        name="tiny", model=model, strategy=strategy, stages=stages, training=Training(**({"batch_size": BATCH} | training))
    )


def model_of(description: ModelDescription = ONE) -> MultimodalModel:
    return build_model(description, seed=0)


def one_stage(plan: Plan) -> Plan:
    """The plan's first stage alone: enough for what does not depend on stages, and quick to export."""
    return plan.model_copy(update={"stages": plan.stages[:1]})


def export_tiny(folder: Path, cache: Path, engines: tuple[EngineName, ...] = ("torch",), **options: object) -> Manifest:
    return export_bundle(options.pop("plan", one_stage(plan_of())), folder, engines, cache=cache, workers=1, **options)


class Doubling(nn.Module):
    """A layer that gives twice as many tokens as it takes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x], dim=1)
