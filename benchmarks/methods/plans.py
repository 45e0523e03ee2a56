"""The methods that are compared. A method is a function of (model, rounds, clients, seed) that gives a plan; a line in
`METHODS`, in `OPTIONS` (a change of a layer-wise or progressive plan, or several), in `PARTIAL` (devices with one modality take
part), or in `SELF_SUPERVISED` for data whose labels are only looked at by a probe, adds one.

All of a family are given the same rounds, local epochs, batch and optimiser. A stage's learning rate is the demo's for its
strategy (`benchmarks.demo.plan`), where it was chosen on AV-Digits for all three. Pairs and self-supervised stages have one
rate for all strategies, as in the papers, but for `_ours`.
"""

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from benchmarks.demo.plan import LEARNING_RATE, blended, skewed_rounds
from lamina.plans.model import Contrastive, ModelDescription, ModuleEncoder, Projection, SelfSupervised, Supervised
from lamina.plans.plan import (
    SGD,
    AdamW,
    Augmentation,
    Calibration,
    Cohort,
    DepthDropout,
    FeatureStore,
    Plan,
    SelfTuning,
    StrategyName,
    Training,
)
from lamina.plans.strategies import make_stages

MakePlan = Callable[[ModelDescription, int, int, int], Plan]

BATCH, LOCAL_EPOCHS = 16, 2
ONE_RATE = 1e-3
"""For pairs and self-supervised stages. The demo's layer-wise rate, three times higher, is too high for pairs; docs/findings.md
has the trial."""
PRETRAINED_RATE: dict[StrategyName, float] = {"layerwise": 1e-3, "progressive": 3e-4, "end_to_end": 3e-4}
"""As in `benchmarks.minilm`, where they were chosen on texts of the training side. At 1e-3 end to end ruins the weights: one
seed of this comparison reached 0.609 with it."""
SLOW = 0.01
"""The rate of layers that hardly learn, to that of the heads."""
BASELINE, SELF_SUPERVISED_BASELINE, RECIPE = "end_to_end", "fedssl", "lamina"


def strategy_plan(
    model: ModelDescription,
    rounds: int,
    clients: int,
    seed: int,
    strategy: StrategyName,
    layers_per_stage: int = 1,
    more: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
    rate_scale: float = 1.0,
    layer_scale: float = 1.0,
    **training: object,
) -> Plan:
    """A plan of one of the three strategies. `training` changes single settings of `lamina.plans.plan.Training`, `more` of
    `lamina.plans.plan.Plan`, and `objective` of the model's objective; `rate_scale` multiplies the learning rate, and layers
    learn `layer_scale` times as fast as heads.

    An encoder that brings its weights keeps its stem as it is, a table of words that is half of the model, and has rates of its
    own."""
    if objective:
        changed = type(model.objective).model_validate(model.objective.model_dump() | objective)
        model = model.model_copy(update={"objective": changed})
    most = max(encoder.layers for encoder in model.encoders)
    num_stages = 1 if strategy == "end_to_end" else -(-most // layers_per_stage)
    is_pretrained = any(isinstance(encoder, ModuleEncoder) for encoder in model.encoders)
    rate = ONE_RATE if isinstance(model.objective, Contrastive) else LEARNING_RATE[strategy]
    rate = PRETRAINED_RATE[strategy] if is_pretrained else rate
    settings = {"batch_size": BATCH, "local_epochs": LOCAL_EPOCHS, "optimizer": AdamW(weight_decay=0.01)} | training
    return Plan(
        name=model.name,
        model=model,
        strategy=strategy,
        stages=make_stages(
            model,
            strategy,
            skewed_rounds(rounds, num_stages),
            rate * rate_scale,
            layers_per_stage,
            freeze_stems=is_pretrained,
            rate_scales={} if layer_scale == 1 else dict.fromkeys(model.modalities, layer_scale),
        ),
        training=Training.model_validate(settings),
        cohort=Cohort(size=clients, min_updates=clients),
        seed=seed,
        **(more or {}),
    )


def self_supervised_plan(
    model: ModelDescription,
    rounds: int,
    clients: int,
    seed: int,
    strategy: StrategyName,
    objective: SelfSupervised,
    learning_rate: float = ONE_RATE,
    calibration: Calibration | None = None,
    layers_per_stage: int = 1,
    is_ours: bool = False,
    first: Fraction = Fraction(4, 9),
    zero_init: bool = False,
    **training: object,
) -> Plan:
    """The model's encoder with a self-supervised objective. Rounds are spread evenly over the stages, and all strategies have
    one rate, as in the papers; or, `is_ours`, as the supervised plans have them: the share `first` of the rounds for stage 0,
    which alone trains the stem, and the strategy's own rate.

    Crops and gains are there because moved, mirrored and noisy images alone taught SimCLR nothing, in a trial before this.
    """
    (encoder,) = model.encoders
    is_image = encoder.input.kind in ("image", "image_patches")
    settings = {
        "batch_size": 32,
        "local_epochs": LOCAL_EPOCHS,
        "optimizer": AdamW(weight_decay=1e-5),
        "augmentation": {encoder.modality: Augmentation(crop=0.3, gain=0.5, noise=0.1, flip=is_image)},
        "features": FeatureStore(views=8),
    }
    model = model.model_copy(update={"objective": objective})
    rounds_of = skewed_rounds(rounds, -(-encoder.layers // layers_per_stage), first) if is_ours else rounds
    learning_rate = LEARNING_RATE[strategy] if is_ours else learning_rate
    return Plan(
        name=model.name,
        model=model,
        strategy=strategy,
        stages=make_stages(model, strategy, rounds_of, learning_rate, layers_per_stage=layers_per_stage),
        training=Training.model_validate(settings | training),
        cohort=Cohort(size=clients, min_updates=clients),
        calibration=calibration,
        zero_init=zero_init,
        seed=seed,
    )


METHODS: dict[str, MakePlan] = {
    "end_to_end": lambda *given: strategy_plan(*given, "end_to_end"),
    "layerwise": lambda *given: strategy_plan(*given, "layerwise"),
    "layerwise_2": lambda *given: strategy_plan(*given, "layerwise", 2),
    "progressive": lambda *given: strategy_plan(*given, "progressive"),
}

_ZERO: dict[str, Any] = {"zero_init": True}
_DISTILL: dict[str, Any] = {"distill": 0.5}
_SMALL_FILES: dict[str, Any] = {
    "download_encoding": "fp16",
    "upload_encoding": "int8",
    "compression": "zstd",
    "features": FeatureStore(encoding="fp16"),
}
_LEAN = _SMALL_FILES | {"micro_batch": 4}
_STORED_VIEWS = {"features": FeatureStore(views=8, encoding="fp16")}
_VIEWS: dict[str, Any] = {
    "augmentation": {"image": Augmentation(shift=4, erase=0.3), "text": Augmentation(erase=0.3)},
    "features": FeatureStore(views=8),
}
_STALL: dict[str, Any] = {"self_tuning": SelfTuning(patience=1, min_improvement=0.05)}


def recipe(model: ModelDescription, rounds: int, clients: int, seed: int) -> Plan:
    """What lamina recommends (plans/lamina.toml): one layer at a time that begins as the identity, gradient blending where
    there are labels, micro-batches, and small encodings."""
    model = blended(model) if isinstance(model.objective, Supervised) else model
    return strategy_plan(model, rounds, clients, seed, "layerwise", more=_ZERO, **_LEAN)


def with_blending(strategy: StrategyName) -> MakePlan:
    return lambda model, *given: strategy_plan(blended(model), *given, strategy)


def with_wide_heads(model: ModelDescription) -> ModelDescription:
    """Projections of 512 and 128 instead of 64 and 32: what the small heads of all other plans are measured against."""
    return model.model_copy(update={"projection": Projection(hidden=512, output=128)})


BLENDED: dict[str, MakePlan] = {
    "e2e_blend": with_blending("end_to_end"),
    "lw_blend": with_blending("layerwise"),
    "prog_blend": with_blending("progressive"),
}
"""Gradient blending for every strategy, so that it is not counted for one of them alone."""

OPTIONS: dict[str, MakePlan] = {
    "e2e_half_rate": lambda *given: strategy_plan(*given, "end_to_end", rate_scale=0.5),
    "e2e_double_rate": lambda *given: strategy_plan(*given, "end_to_end", rate_scale=2.0),
    "lw_zero_init": lambda *given: strategy_plan(*given, "layerwise", more=_ZERO),
    "lw_warm_up": lambda *given: strategy_plan(*given, "layerwise", warm_up_rounds=1),
    "lw_keep_optimizer": lambda *given: strategy_plan(*given, "layerwise", keep_optimizer=True),
    "lw_distill": lambda *given: strategy_plan(*given, "layerwise", objective=_DISTILL),
    "lw_gated": lambda *given: strategy_plan(*given, "layerwise", objective={"fusion": "gated"}),
    "lw_self_attention": lambda *given: strategy_plan(*given, "layerwise", objective={"fusion": "self_attention"}),
    "lw_co_attention": lambda *given: strategy_plan(*given, "layerwise", objective={"fusion": "co_attention"}),
    "lw_sum": lambda *given: strategy_plan(*given, "layerwise", objective={"fusion": "sum"}),
    **BLENDED,
    "lw_align": lambda *given: strategy_plan(*given, "layerwise", objective={"align": 0.1}),
    "lw_proximal": lambda *given: strategy_plan(*given, "layerwise", proximal=0.01),
    "lw_wide_heads": lambda model, *given: strategy_plan(with_wide_heads(model), *given, "layerwise"),
    "lw_self_tuning": lambda *given: strategy_plan(*given, "layerwise", more=_STALL),
    "lw2_zero_init": lambda *given: strategy_plan(*given, "layerwise", 2, more=_ZERO),
    "lw2_together": lambda *given: strategy_plan(*given, "layerwise", 2, more=_ZERO, objective=_DISTILL, keep_optimizer=True),
    "prog_zero_init": lambda *given: strategy_plan(*given, "progressive", more=_ZERO),
    "lw_lean": lambda *given: strategy_plan(*given, "layerwise", **_LEAN),
    RECIPE: recipe,
}
"""For labelled data, and, but for what changes a supervised objective, for pairs."""
PAIRS: dict[str, MakePlan] = {
    "lw_views": lambda *given: strategy_plan(*given, "layerwise", **_VIEWS),
    "lw_classes": lambda *given: strategy_plan(*given, "layerwise", objective={"classes": 10}),
}
"""Of image and text, the augmentation that `PARTIAL` needs, by itself. Of pairs that were made by class: all of a class are
positives."""


def with_some_modalities(strategy: StrategyName) -> MakePlan:
    """Devices with one modality take part too; of pairs, they train two augmented views."""

    def make(model: ModelDescription, rounds: int, clients: int, seed: int) -> Plan:
        alone: dict[str, Any] = {"device_modalities": [[modality] for modality in model.modalities]}
        views = _VIEWS if isinstance(model.objective, Contrastive) else {}
        return strategy_plan(model, rounds, clients, seed, strategy, more=alone, **views)

    return make


def gated(model: ModelDescription) -> ModelDescription:
    """The layers of encoders that bring their weights begin as the identity, as `zero_init` lets those of the family."""
    encoders = tuple(
        each.model_copy(update={"options": each.options | {"gated": True}}) if isinstance(each, ModuleEncoder) else each
        for each in model.encoders
    )
    return model.model_copy(update={"encoders": encoders})


PRETRAINED: dict[str, MakePlan] = {
    "lw_slow_layers": lambda *given: strategy_plan(*given, "layerwise", layer_scale=SLOW),
    "lw_slow_layers_gated": lambda model, *given: strategy_plan(gated(model), *given, "layerwise", layer_scale=SLOW),
    "lw_gated_layers": lambda model, *given: strategy_plan(gated(model), *given, "layerwise"),
}
"""For a pretrained encoder. Layers that hardly learn, beside heads that do, are the first stages of the papers' schedule."""

PARTIAL: dict[str, MakePlan] = {
    "e2e_partial": with_some_modalities("end_to_end"),
    "lw_partial": with_some_modalities("layerwise"),
}

REAL: dict[str, MakePlan] = {"layerwise_real": METHODS["layerwise"]}
"""Run by real processes over HTTP, not in simulation (`benchmarks.demo.federated`)."""

_MOCO, _SIMCLR = SelfSupervised(method="moco"), SelfSupervised(method="simclr")
_ALIGNED, _MOON = SelfSupervised(method="moco", align=0.5), SelfSupervised(method="moco", moon=0.5)
_CALIBRATION = Calibration(data="500 images of the server", learning_rate=1e-3)
_FRESH = FeatureStore(views=8, keep="round")
_FLL = {"optimizer": SGD(momentum=0.9)}


def recipe_without_labels(model: ModelDescription, rounds: int, clients: int, seed: int) -> Plan:
    """What lamina recommends where there are no labels: most rounds for stage 0, layers that begin as the identity, and batches
    of 64 in micro-batches. Chosen on Fashion-MNIST's held-out images (docs/findings.md)."""
    return self_supervised_plan(
        model,
        rounds,
        clients,
        seed,
        "layerwise",
        _SIMCLR,
        is_ours=True,
        first=Fraction(13, 18),
        zero_init=True,
        batch_size=64,
        **(_SMALL_FILES | _STORED_VIEWS | {"micro_batch": 16}),
    )


ELSEWHERE = ("lw_fedsimclr_lean", "lw_fedsimclr_lean_ours", "lw_fedsimclr_whole_ours", "fedssl_triple_rate")
"""Methods of `SELF_SUPERVISED` that are run with 12 and 16 layers, or with many clients, alone."""
SELF_SUPERVISED: dict[str, MakePlan] = {
    "fedssl": lambda *given: self_supervised_plan(*given, "end_to_end", _MOCO),
    "fedssl_half_rate": lambda *given: self_supervised_plan(*given, "end_to_end", _MOCO, ONE_RATE / 2),
    "fedssl_double_rate": lambda *given: self_supervised_plan(*given, "end_to_end", _MOCO, ONE_RATE * 2),
    "fedssl_triple_rate": lambda *given: self_supervised_plan(*given, "end_to_end", _MOCO, ONE_RATE * 3),
    "lw_fedssl": lambda *given: self_supervised_plan(*given, "layerwise", _MOCO),
    "lw_fedssl_half_rate": lambda *given: self_supervised_plan(*given, "layerwise", _MOCO, ONE_RATE / 2),
    "prog_fedssl": lambda *given: self_supervised_plan(*given, "progressive", _MOCO),
    "lw_fedssl_2": lambda *given: self_supervised_plan(*given, "layerwise", _MOCO, layers_per_stage=2),
    "lw_fedssl_ours": lambda *given: self_supervised_plan(*given, "layerwise", _MOCO, is_ours=True),
    "lw_fedssl_proximal": lambda *given: self_supervised_plan(*given, "layerwise", _MOCO, proximal=0.01),
    "lw_fedssl_aligned": lambda *given: self_supervised_plan(*given, "layerwise", _ALIGNED),
    "lw_fedssl_moon": lambda *given: self_supervised_plan(*given, "layerwise", _MOON),
    "lw_fedssl_calibrated": lambda *given: self_supervised_plan(
        *given, "layerwise", _ALIGNED, calibration=_CALIBRATION, features=_FRESH
    ),
    "lw_fedssl_lean": lambda *given: self_supervised_plan(*given, "layerwise", _MOCO, **(_LEAN | _STORED_VIEWS)),
    "lw_fedbyol": lambda *given: self_supervised_plan(*given, "layerwise", SelfSupervised(method="byol")),
    "fedbyol": lambda *given: self_supervised_plan(*given, "end_to_end", SelfSupervised(method="byol")),
    "fedbyol_half_rate": lambda *given: self_supervised_plan(*given, "end_to_end", SelfSupervised(method="byol"), ONE_RATE / 2),
    "fedsimclr": lambda *given: self_supervised_plan(*given, "end_to_end", _SIMCLR),
    "fedsimclr_half_rate": lambda *given: self_supervised_plan(*given, "end_to_end", _SIMCLR, ONE_RATE / 2),
    "fedsimclr_batch_64": lambda *given: self_supervised_plan(*given, "end_to_end", _SIMCLR, batch_size=64),
    "fedsimclr_double_rate": lambda *given: self_supervised_plan(*given, "end_to_end", _SIMCLR, ONE_RATE * 2),
    "lw_fedsimclr_lean": lambda *given: self_supervised_plan(*given, "layerwise", _SIMCLR, **(_LEAN | _STORED_VIEWS)),
    "lw_fedsimclr_lean_ours": lambda *given: self_supervised_plan(
        *given, "layerwise", _SIMCLR, is_ours=True, **(_LEAN | _STORED_VIEWS)
    ),
    "lw_fedsimclr_whole_ours": lambda *given: self_supervised_plan(
        *given, "layerwise", _SIMCLR, is_ours=True, **(_SMALL_FILES | _STORED_VIEWS)
    ),
    "lamina_simclr": recipe_without_labels,
    "lw_fedsimclr": lambda *given: self_supervised_plan(*given, "layerwise", _SIMCLR),
    "fedsimclr_sgd": lambda *given: self_supervised_plan(*given, "end_to_end", _SIMCLR, 0.05, **_FLL),
    "fll": lambda *given: self_supervised_plan(*given, "layerwise", _SIMCLR, 0.05, **_FLL),
    "fll_depth_dropout": lambda *given: self_supervised_plan(
        *given,
        "layerwise",
        _SIMCLR,
        0.05,
        **_FLL,
        depth_dropout=DepthDropout(budget=3),
        features=_FRESH,
    ),
}

ALL: dict[str, MakePlan] = METHODS | OPTIONS | PAIRS | PARTIAL | PRETRAINED | REAL | SELF_SUPERVISED


def baseline_of(method: str) -> str:
    """The end-to-end method that a method is compared with: the one of the same objective, and, for FLL, of its optimiser."""
    if method not in SELF_SUPERVISED and method != SELF_SUPERVISED_BASELINE:
        return BASELINE
    if "byol" in method:
        return "fedbyol"
    if method.startswith("fll") or method.endswith("_sgd"):
        return "fedsimclr_sgd"
    return "fedsimclr" if "simclr" in method else SELF_SUPERVISED_BASELINE


def rates_of(baseline: str) -> tuple[str, ...]:
    """The names of an end-to-end method at its common rate, and at others."""
    name = "e2e" if baseline == BASELINE else baseline
    return (baseline, *(f"{name}_{rate}_rate" for rate in ("half", "double", "triple")))
