"""A plan says at once what cannot be combined, and why; what can be is the same plan after a passage through JSON."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from lamina.plans.model import (
    Contrastive,
    Encoder,
    ImagePatches,
    ModelDescription,
    ModuleEncoder,
    Projection,
    SelfSupervised,
    Supervised,
    TextTokens,
)
from lamina.plans.model import Image as ImageInput
from lamina.plans.plan import Augmentation, Calibration, Cohort, DepthDropout, FeatureStore, Plan, Training
from lamina.plans.strategies import make_stages

PLANS = Path(__file__).parents[2] / "benchmarks" / "plans"
NEEDS_WEIGHTS = "minilm"
"""Its model is built of downloaded weights."""
PLAN_FILES = sorted(path for path in PLANS.rglob("*") if path.is_file() and path.stem != NEEDS_WEIGHTS)
LAYERS = 4


def encoder(modality: str) -> Encoder:
    return Encoder(
        modality=modality, input=ImagePatches(channels=1, height=8, width=8, patch=4), width=8, heads=2, layers=LAYERS
    )


def model(objective: Supervised | Contrastive | SelfSupervised, *modalities: str) -> ModelDescription:
    return ModelDescription(
        name="m",
        encoders=tuple(encoder(modality) for modality in modalities),
        projection=Projection(hidden=8, output=4),
        objective=objective,
    )


BOTH = model(Supervised(classes=3), "image", "depth")
VIEWS = model(SelfSupervised(method="byol"), "image")
PAIR = model(Contrastive(temperature=0.3), "image", "depth")
TEXTS = PAIR.model_copy(
    update={
        "encoders": (
            encoder("image"),
            Encoder(modality="text", input=TextTokens(vocabulary=9, length=4), width=8, heads=2, layers=LAYERS),
        )
    }
)
AUGMENTED = {"augmentation": {"image": Augmentation(noise=0.1)}, "features": FeatureStore(views=2)}


def plan(description: ModelDescription, strategy: str = "layerwise", layers_per_stage: int = 1, **changes: object) -> Plan:
    stages = make_stages(description, strategy, 8, 0.1, layers_per_stage)  # type: ignore[arg-type]
    return Plan(name="p", model=description, strategy=strategy, stages=stages, **changes)  # type: ignore[arg-type]


LEGAL = {
    "supervised": lambda: plan(BOTH),
    "missing modalities, zero start": lambda: plan(BOTH, device_modalities=(("image",), ("depth",)), zero_init=True),
    "self-supervised": lambda: plan(VIEWS, training=Training(**AUGMENTED)),
    "simclr in micro-batches": lambda: plan(model(SelfSupervised(), "image"), training=Training(micro_batch=4, **AUGMENTED)),
    "moco in micro-batches": lambda: plan(
        model(SelfSupervised(method="moco"), "image"), training=Training(micro_batch=4, **AUGMENTED)
    ),
    "calibrated": lambda: plan(
        VIEWS, "progressive", training=Training(**AUGMENTED), calibration=Calibration(data="ours", learning_rate=0.1)
    ),
    "pairs, and devices with one modality": lambda: plan(
        PAIR, device_modalities=(("image",),), training=Training(micro_batch=4, **AUGMENTED)
    ),
    "two views of texts": lambda: plan(
        model(SelfSupervised(), "image").model_copy(update={"encoders": TEXTS.encoders[1:]}),
        training=Training(augmentation={"text": Augmentation(erase=0.3)}, features=FeatureStore(views=2)),
    ),
    "depth dropout": lambda: plan(
        BOTH, training=Training(depth_dropout=DepthDropout(budget=2), features=FeatureStore(keep="none"))
    ),
    "depth dropout of a pool": lambda: plan(BOTH, training=Training(depth_dropout=DepthDropout(budget=3, pool=2))),
}


@pytest.mark.parametrize("make", LEGAL.values(), ids=LEGAL)
def test_every_method_has_a_legal_plan(make: Callable[[], Plan]) -> None:
    made = make()
    assert Plan.from_json(made.to_json()) == made


@pytest.mark.parametrize("path", PLAN_FILES, ids=lambda path: path.stem)
def test_the_plan_of_a_plan_file_is_the_same_after_a_passage_through_json(path: Path) -> None:
    from export.plans.resolve import resolve

    read = resolve(str(path)).plan
    assert type(read).from_json(read.to_json()) == read


def test_every_plan_file_was_read_but_one() -> None:
    assert len(PLAN_FILES) == sum(path.is_file() for path in PLANS.rglob("*")) - 1


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: plan(VIEWS, training=Training(**AUGMENTED), calibration=Calibration(learning_rate=0.1)), "calibration.data"),
        (
            lambda: plan(VIEWS, training=Training(**AUGMENTED), calibration=Calibration(data="ours", learning_rate=0.1)),
            "calibration changes the prefix in every round",
        ),
        (lambda: plan(BOTH, training=Training(depth_dropout=DepthDropout(budget=2))), "depth_dropout draws another prefix"),
        (
            lambda: plan(BOTH, "progressive", training=Training(depth_dropout=DepthDropout(budget=2, pool=1))),
            "drops frozen layers, and strategy 'progressive' has none",
        ),
        (
            lambda: plan(BOTH, layers_per_stage=2, training=Training(depth_dropout=DepthDropout(budget=2, pool=1))),
            "must be above the 2 layers that are active",
        ),
        (lambda: Training(batch_size=1), "batch_size 1: .*BYOL"),
        (lambda: plan(VIEWS), "give training.augmentation"),
        (
            lambda: plan(VIEWS, training=Training(**(AUGMENTED | {"features": FeatureStore(views=3)}))),
            "features.views must be even, it is 3",
        ),
        *(
            (
                lambda objective=objective: plan(model(objective, "image"), training=Training(micro_batch=4, **AUGMENTED)),
                "whole batch",
            )
            for objective in (SelfSupervised(method="moco", moon=0.1), SelfSupervised(align=0.1))
        ),
        (
            lambda: plan(PAIR, device_modalities=(("depth",),), training=Training(**AUGMENTED)),
            "a device with depth alone has no pairs and compares two augmented views .* give training.augmentation.depth",
        ),
        (
            lambda: plan(
                PAIR,
                device_modalities=(("image",),),
                training=Training(augmentation={"image": Augmentation()}, features=FeatureStore(views=2)),
            ),
            "views of an example, which would be equal",
        ),
        (
            lambda: plan(
                PAIR, device_modalities=(("image",),), training=Training(**(AUGMENTED | {"features": FeatureStore(views=3)}))
            ),
            "no pairs and compares two views of an example: training.features.views must be even, it is 3",
        ),
        (
            lambda: plan(
                PAIR, device_modalities=(("image",),), training=Training(**(AUGMENTED | {"features": FeatureStore()}))
            ),
            "must be even, it is 1",
        ),
        (lambda: plan(TEXTS, training=Training(augmentation={"text": Augmentation(noise=0.1)})), "texts take erase alone"),
        (lambda: plan(TEXTS, training=Training(augmentation={"text": Augmentation(flip=True, erase=0.1)})), "texts take erase"),
        (lambda: plan(BOTH, device_modalities=(("depth", "image"),)), "must be some of"),
        (lambda: plan(BOTH, device_modalities=(("sound",),)), "names 'sound'"),
        (lambda: plan(BOTH, "end_to_end", zero_init=True), "attaches all at once"),
        (
            lambda: plan(model(Supervised(classes=3, distill=1.0), "image", "depth"), "progressive"),
            "distill: only layerwise stages have a teacher",
        ),
        (lambda: model(SelfSupervised(), "image", "depth"), "one modality at a time"),
        (lambda: model(Supervised(classes=3, fusion="gated"), "image"), "nothing to fuse"),
        (lambda: model(Supervised(classes=3, blend={"sound": 1.0}), "image"), "blend names 'sound'"),
        (lambda: model(Supervised(classes=3, fusion="co_attention"), "a", "b", "c"), "exactly two modalities"),
        (lambda: Cohort(size=4, pool=3), "pool 3 is smaller than the cohort size 4"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_reason(make, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValidationError, match=reason):
        make()


def test_a_device_with_one_modality_of_a_contrastive_model_trains_two_views_of_it_at_the_same_temperature() -> None:
    alone = PAIR.of_device(("depth",))
    assert ModelDescription.from_json(alone.to_json()) == alone
    assert (alone.modalities, alone.labels) == (("depth",), None)
    assert alone.objective == SelfSupervised(method="simclr", temperature=0.3)
    for whole in (PAIR.of_device(()), PAIR.of_device(("image", "depth"))):
        assert whole is PAIR
    assert BOTH.of_device(("image",)) is BOTH


def test_an_augmentation_without_erase_is_the_same_text_as_before_there_was_one() -> None:
    assert "erase" not in Augmentation(shift=2).model_dump_json()
    assert Augmentation.from_json(Augmentation(erase=0.5).to_json()).erase == 0.5
    with pytest.raises(ValidationError, match="less than 1"):
        Augmentation(erase=1.0)


def test_zero_init_is_refused_for_layers_that_bring_their_own_start() -> None:
    own = ModuleEncoder(
        modality="image",
        factory="mine:make",
        input=ImageInput(channels=1, height=8, width=8),
        features=((4, 8),) * (LAYERS + 1),
        width=8,
    )
    description = BOTH.model_copy(update={"encoders": (own, encoder("depth"))})
    with pytest.raises(ValidationError, match="gated = true"):
        plan(description, zero_init=True)


def test_rate_scales_name_modalities_or_heads() -> None:
    stages = make_stages(BOTH, "layerwise", 8, 0.1, rate_scales={"image": 0.5, "heads": 2.0})
    rates = [stages[0].rate_scale(name) for name in ("image.stem", "image.layers.0", "depth.norm", "image.projection", "head")]
    assert rates == [0.5, 0.5, 1.0, 2.0, 2.0]
    with pytest.raises(ValidationError, match="rate_scales names 'sound'"):
        Plan(
            name="p",
            model=BOTH,
            strategy="layerwise",
            stages=make_stages(BOTH, "layerwise", 8, 0.1, rate_scales={"sound": 1.0}),
        )
