"""The reference workload: ViT-Tiny, 12 blocks of width 192, 3 heads, MLP 768, 197 tokens.

ViT-Tiny at 224 pixels has 196 patches of 16x16x3 = 768 values and a class token. Here the 197 tokens come as frames of 768
values, so the stem is the same Linear(768, 192) and each block sees exactly ViT-Tiny's tensors.
"""

from lamina.model import AudioFrames, Encoder, ModelDescription, Projection, Supervised
from lamina.plan import SGD, Cohort, OptimizerSettings, Plan, StrategyName, Training
from lamina.strategies import make_stages

TOKENS, PATCH_VALUES, LAYERS, CLASSES = 197, 768, 12, 10


def vit_tiny(tokens: int = TOKENS, layers: int = LAYERS) -> ModelDescription:
    return ModelDescription(
        name="vit_tiny",
        encoders=(
            Encoder(
                modality="image",
                input=AudioFrames(frames=tokens, coefficients=PATCH_VALUES),
                width=192,
                heads=3,
                layers=layers,
            ),
        ),
        projection=Projection(hidden=192, output=64),
        objective=Supervised(classes=CLASSES),
    )


def vit_tiny_plan(
    strategy: StrategyName,
    tokens: int = TOKENS,
    layers: int = LAYERS,
    batch_size: int = 16,
    optimizer: OptimizerSettings = SGD(momentum=0.9),  # noqa: B008 (immutable)
) -> Plan:
    """A plan whose last stage is the one to measure."""
    model = vit_tiny(tokens, layers)
    return Plan(
        name=f"vit_tiny_{strategy}",
        model=model,
        strategy=strategy,
        stages=make_stages(model, strategy, rounds=layers, learning_rate=1e-3),
        training=Training(batch_size=batch_size, optimizer=optimizer),
        cohort=Cohort(size=1),
    )
