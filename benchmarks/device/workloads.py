"""The reference workloads of the benchmarks.

    vit12   ViT-Tiny: 12 blocks of width 192, 3 heads, MLP 768, 197 tokens; 10 classes, batch 16
    pair    the same image encoder and a text encoder of 6 blocks (width 384, 6 heads, 40 tokens); InfoNCE, batch 64
    tiny    2 blocks of width 32: a case takes a second, for tests and for a first try

ViT-Tiny at 224 pixels has 196 patches of 16x16x3 = 768 values and a class token. Here the 197 tokens come as frames of 768
values, so the stem is the same Linear(768, 192) and each block sees exactly ViT-Tiny's tensors.
"""

from dataclasses import dataclass
from typing import Literal

from lamina.plans.model import AudioFrames, Contrastive, Encoder, ModelDescription, Projection, Supervised, TextTokens
from lamina.plans.plan import SGD, AdamW, Cohort, OptimizerSettings, Plan, Stage, StrategyName, Training
from lamina.plans.segments import HEAD, layer, norm, projection, segment_names, stem
from lamina.plans.strategies import make_stages

TOKENS, PATCH_VALUES, LAYERS, CLASSES = 197, 768, 12, 10
VOCABULARY, TEXT_TOKENS = 30522, 40

Graph = Literal["full", "cut"]
OPTIMIZERS: dict[str, OptimizerSettings] = {"sgd": SGD(momentum=0.9), "adamw": AdamW()}


@dataclass(frozen=True)
class Workload:
    """A model with the effective batch that it is trained with, and the micro-batch of the cases that use one."""

    model: ModelDescription
    batch: int
    micro_batch: int


def vit_encoder(tokens: int = TOKENS, layers: int = LAYERS) -> Encoder:
    """ViT-Tiny, as the encoder of the modality `image`."""
    frames = AudioFrames(frames=tokens, coefficients=PATCH_VALUES)
    return Encoder(modality="image", input=frames, width=192, heads=3, layers=layers)


def text_encoder() -> Encoder:
    text = TextTokens(vocabulary=VOCABULARY, length=TEXT_TOKENS)
    return Encoder(modality="text", input=text, width=384, heads=6, layers=6)


WORKLOADS: dict[str, Workload] = {
    "vit12": Workload(
        ModelDescription(
            name="vit12",
            encoders=(vit_encoder(),),
            projection=Projection(hidden=512, output=256),
            objective=Supervised(classes=CLASSES),
        ),
        batch=16,
        micro_batch=4,
    ),
    "pair": Workload(
        ModelDescription(
            name="pair",
            encoders=(vit_encoder(), text_encoder()),
            projection=Projection(hidden=512, output=256),
            objective=Contrastive(),
        ),
        batch=64,
        micro_batch=8,
    ),
    "tiny": Workload(
        ModelDescription(
            name="tiny",
            encoders=(Encoder(modality="image", input=AudioFrames(frames=17, coefficients=12), width=32, heads=2, layers=2),),
            projection=Projection(hidden=16, output=8),
            objective=Supervised(classes=4),
        ),
        batch=4,
        micro_batch=2,
    ),
}


def stage_of(model: ModelDescription, block: int | None) -> Stage:
    """The stage that trains block number `block` of every encoder that has one, or the last block of each (None).

    All below is frozen. Block 0 comes with its stem, as layer-wise training has it. The final norms, the projection heads
    and the classifier are always trained.
    """
    active, frozen = {HEAD}, set()
    for encoder in model.encoders:
        at = encoder.layers - 1 if block is None else block
        blocks = [layer(encoder.modality, index) for index in range(encoder.layers)]
        active |= {norm(encoder.modality), projection(encoder.modality), *blocks[at : at + 1]}
        frozen |= set(blocks[:at])
        (frozen if at else active).add(stem(encoder.modality))
    names = segment_names(model)
    return Stage(
        index=0,
        active=tuple(name for name in names if name in active),
        frozen=tuple(name for name in names if name in frozen),
        rounds=1,
        learning_rate=1e-3,
    )


def one_stage_plan(
    workload: Workload,
    graph: Graph,
    block: int | None,
    batch: int,
    micro_batch: int | None = None,
    prefix_precision: Literal["fp32", "int8"] = "fp32",
) -> Plan:
    """A plan with one stage, the one to measure: the whole model, or one block of each encoder on top of a frozen prefix."""
    model = workload.model
    stage = make_stages(model, "end_to_end", 1, 1e-3)[0] if graph == "full" else stage_of(model, block)
    return Plan(
        name=f"{model.name}_{graph}",
        model=model,
        strategy="end_to_end" if graph == "full" else "layerwise",
        stages=(stage,),
        training=Training(batch_size=batch, micro_batch=micro_batch, prefix_precision=prefix_precision),
        cohort=Cohort(size=1),
    )


def vit_tiny_plan(
    strategy: StrategyName,
    tokens: int = TOKENS,
    layers: int = LAYERS,
    batch_size: int = 16,
    optimizer: OptimizerSettings = SGD(momentum=0.9),  # noqa: B008 (immutable)
) -> Plan:
    """ViT-Tiny with a small projection head, for `benchmarks.engines`: so its numbers stay comparable over time."""
    model = ModelDescription(
        name="vit_tiny",
        encoders=(vit_encoder(tokens, layers),),
        projection=Projection(hidden=192, output=64),
        objective=Supervised(classes=CLASSES),
    )
    return Plan(
        name=f"vit_tiny_{strategy}",
        model=model,
        strategy=strategy,
        stages=make_stages(model, strategy, rounds=layers, learning_rate=1e-3),
        training=Training(batch_size=batch_size, optimizer=optimizer),
        cohort=Cohort(size=1),
    )
