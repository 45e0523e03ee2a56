"""The plan: model + strategy + stages + training settings; all that is decided before the first round.

What cannot be combined is refused here, with the reason, before anything is exported.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lamina.bounds import (
    MAX_FACTOR,
    MAX_ITEMS,
    MAX_ROUNDS,
    MAX_SEGMENTS,
    MAX_STAGES,
    MAX_TEXT,
    Count,
    PositiveCount,
    PositiveSeconds,
    SegmentName,
)
from lamina.data.card import DataCard
from lamina.federation.rules import AnyRule, Mean
from lamina.plans.model import ModelDescription, ModuleEncoder, Name
from lamina.plans.segments import HEAD, heads_of, prefix_chain, segment_names
from lamina.record import Record

StrategyName = Literal["layerwise", "progressive", "end_to_end"]
PositiveFloat = Annotated[float, Field(gt=0, le=MAX_FACTOR)]
Factor = Annotated[float, Field(ge=0, le=MAX_FACTOR)]


class Stage(Record):
    """One step of the plan: which segments train, which are frozen, for how many rounds.

    `active` is in exchange order. `frozen` are the segments below the active ones; a segment in neither list is not part
    of the model yet. `rounds` may be 0: the segments are attached and never trained. `rate_scales` multiply the learning rate
    of a modality's stem, layers and norm (by its name), or that of all projections, predictors and classifiers (`heads`).
    """

    index: Count
    active: Annotated[tuple[SegmentName, ...], Field(min_length=1, max_length=MAX_SEGMENTS)]
    frozen: Annotated[tuple[SegmentName, ...], Field(max_length=MAX_SEGMENTS)] = ()
    rounds: Annotated[int, Field(ge=0, le=MAX_ROUNDS)]
    learning_rate: PositiveFloat
    rate_scales: Annotated[dict[Name, PositiveFloat], Field(max_length=64)] = Field(default_factory=dict)

    def rate_scale(self, segment: str) -> float:
        """The factor of the learning rate of a segment."""
        modality, _, part = segment.partition(".")
        is_head = segment == HEAD or part in ("projection", "predictor", "classifier")
        return self.rate_scales.get("heads" if is_head else modality, 1.0)

    def frozen_chain(self, model: ModelDescription, modality: str) -> list[str]:
        """The frozen prefix of a modality, in the order its features pass it; empty when the stem is active."""
        return [name for name in prefix_chain(model, modality) if name in self.frozen]

    def active_chain(self, model: ModelDescription, modality: str) -> list[str]:
        """The active part of stem and layers of a modality, in order."""
        return [name for name in prefix_chain(model, modality) if name in self.active]


class SGD(Record):
    """torch.optim.SGD: momentum without dampening, L2 weight decay."""

    kind: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Factor = 0.0


class AdamW(Record):
    """torch.optim.AdamW: decoupled weight decay."""

    kind: Literal["adamw"] = "adamw"
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: Factor = 0.01


OptimizerSettings = Annotated[SGD | AdamW, Field(discriminator="kind")]


class FeatureStore(Record):
    """How a device keeps the features of its frozen prefix on disk.

    `encoding` is what a stored value takes: 4 bytes, 2, or 1 with one scale for each token. With augmented data, there are
    `views` versions of every example, stored as rounds take them; epoch e trains on version e mod views, or, where the
    objective compares two views, on versions 2e and 2e + 1 mod views. `keep` says for how long: over the `stage`, for one
    `round`, or `none`: the prefix runs for every batch.
    """

    encoding: Literal["fp32", "fp16", "int8"] = "fp32"
    views: Annotated[int, Field(ge=1, le=64)] = 1
    keep: Literal["stage", "round", "none"] = "stage"


class Augmentation(Record):
    """Random changes of one modality's training examples; they depend on seed, example and view, and on nothing else.

    `shift` moves the example by up to so many steps of its last axis (pixels, samples; for audio frames the first axis) and
    fills with zeros, `noise` is the standard deviation of added Gaussian noise, `flip` mirrors half of the images. `erase` is
    the largest share of the example that one block of random size and place covers with zeros: a rectangle of an image, a span
    of time of audio frames and sensor windows, a span of tokens of a text, where 0 is the padding. Texts take `erase` alone.

    `crop` is the smallest share of the example (of an image's area, of the others' time) that is kept and stretched to the
    whole size; 1 keeps all. `gain` multiplies the example by up to 1 +- gain and adds up to +- gain / 2: the contrast and the
    brightness of an image, the strength of a signal.
    """

    shift: Count = 0
    noise: Factor = 0.0
    flip: bool = False
    erase: Annotated[float, Field(ge=0, lt=1)] = 0.0
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    gain: Annotated[float, Field(ge=0, lt=1)] = 0.0


class DepthDropout(Record):
    """Federated Depth Dropout (methods: FLL, section 3): a device gets at most `budget` layers of an encoder in a round.

    They are the active ones, the first layer, and others of the frozen ones, drawn at random for each device and round; their
    order stays. With `pool`, each device draws from so many fixed sets, so that it can keep the features of each.
    """

    budget: Annotated[int, Field(ge=2, le=MAX_SEGMENTS)]
    pool: Annotated[int, Field(ge=1, le=16)] | None = None


class Training(Record):
    """What a device does in one round. The optimiser starts fresh in each round, as in FedMML, unless `keep_optimizer`: then a
    device goes on with the moments of its last round of the same stage.

    `proximal` is c of the term c/2 |w - w_start|^2 that holds a device near the weights it was given (FedProx). In the first
    `warm_up_rounds` rounds of each stage after the first, the learning rate climbs in equal steps to that of the stage.

    `micro_batch` samples are in memory at a time (None: the whole batch); the gradient is that of the whole batch.
    `prefix_precision` is that of the frozen layers' weights. `download_encoding` and `upload_encoding` are the smallest
    encodings that a device may be given and asked for; one that cannot read them gets the next larger one that it knows.
    """

    batch_size: PositiveCount = 32
    micro_batch: PositiveCount | None = None
    local_epochs: PositiveCount = 1
    optimizer: OptimizerSettings = AdamW()
    keep_optimizer: bool = False
    proximal: Factor = 0.0
    warm_up_rounds: Count = 0
    depth_dropout: DepthDropout | None = None
    features: FeatureStore = FeatureStore()
    augmentation: dict[Name, Augmentation] = Field(default_factory=dict)
    prefix_precision: Literal["fp32", "int8"] = "fp32"
    download_encoding: Literal["fp32", "fp16", "int8"] = "fp32"
    upload_encoding: Literal["fp32", "fp16", "int8"] = "fp32"
    compression: Literal["none", "zstd"] = "none"

    @model_validator(mode="after")
    def _fits_together(self) -> "Training":
        if self.batch_size == 1:
            raise ValueError(
                "batch_size 1: contrastive objectives need other samples to tell apart, and BYOL needs them to keep its "
                "embeddings from becoming one point; use at least 2"
            )
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise ValueError(f"micro_batch {self.micro_batch} is larger than batch_size {self.batch_size}")
        if self.features.views > 1 and not self.augmentation:
            raise ValueError(f"features.views is {self.features.views}, but without augmentation all views are equal")
        if self.depth_dropout and self.depth_dropout.pool is None and self.features.keep == "stage":
            raise ValueError(
                "depth_dropout draws another prefix in every round, so features cannot be kept over a stage: set features.keep "
                "to 'round' or 'none', or give depth_dropout.pool, a number of fixed prefixes to draw from"
            )
        return self

    @property
    def samples_in_memory(self) -> int:
        """The largest batch that a program with activations has to take."""
        return self.micro_batch or self.batch_size


class Cohort(Record):
    """Who takes part in a round, and how much of it one device may be.

    A round starts when `size` devices have checked in and closes when all of them have sent an update, or at
    `deadline_seconds` after its start with at least `min_updates`. A device that stays silent for `lease_seconds`
    loses its place to another one that asks for work.

    With `pool`, a round starts when so many devices are there, and its cohort is drawn from them: uniformly, without
    replacement, by the plan's seed, stage and round. Devices evaluate the new weights after every `evaluate_every`-th round of
    a stage and after its last one; 0: never.

    An update counts with at most `max_examples` examples. One whose difference is longer than `max_norm` times the median of
    the round is shortened to that (`lamina.federation.influence`). None: no bound to the examples, and 100 times the median.
    """

    size: Annotated[int, Field(ge=1, le=MAX_ITEMS)] = 4
    pool: Annotated[int, Field(ge=1, le=MAX_ITEMS)] | None = None
    evaluate_every: Count = 1
    min_updates: PositiveCount = 1
    deadline_seconds: PositiveSeconds = 3600.0
    lease_seconds: PositiveSeconds = 600.0
    max_examples: PositiveCount | None = None
    max_norm: Annotated[float, Field(ge=1, le=MAX_FACTOR)] | None = None

    @model_validator(mode="after")
    def _min_fits(self) -> "Cohort":
        if self.min_updates > self.size:
            raise ValueError(f"min_updates {self.min_updates} is larger than the cohort size {self.size}")
        if self.pool is not None and self.pool < self.size:
            raise ValueError(f"pool {self.pool} is smaller than the cohort size {self.size} that is drawn from it")
        return self

    @property
    def present(self) -> int:
        """How many devices a round waits for."""
        return self.pool or self.size

    def evaluates(self, round_number: int, is_last: bool) -> bool:
        """Whether devices evaluate after this round of a stage, counted from 0."""
        return self.evaluate_every > 0 and (is_last or (round_number + 1) % self.evaluate_every == 0)


class SelfTuning(Record):
    """A stage ends early when it stops improving: after `patience` rounds in a row that did not bring `measure` below its best
    value so far by `min_improvement`, a share of that value. A stage's `rounds` are then the most that it may take.

    `train_loss` is the mean over the cohort, by examples; `test_loss` that of the devices' test examples.
    """

    patience: PositiveCount = 2
    min_improvement: Annotated[float, Field(ge=0, lt=1)] = 0.01
    measure: Literal["train_loss", "test_loss"] = "train_loss"


class Calibration(Record):
    """Server-side calibration of LW-FedSSL v1 to v3, as we reconstruct it (methods, section 2.2): after each aggregation, the
    server trains all that is attached so far on data of its own, an .npz as devices have it, for `epochs` passes.

    `data` names that data; the process that holds it is `lamina calibrate`.
    """

    data: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)] | None = None
    epochs: PositiveCount = 1
    learning_rate: PositiveFloat


class Plan(Record):
    """Everything that is decided before the first round.

    `device_modalities` are the sets of modalities that devices may have besides all of them (what they train:
    `ModelDescription.of_device`). `zero_init` lets each layer that is attached after the first stage begin as the identity
    (its residual branches start at zero), so that the model does not change when a stage begins. `aggregation` is the rule that
    makes new weights of updates (`lamina.federation.rules`), and `server_learning_rate` scales what it adds. `data_card` is
    what the data of all devices has in common; what it leaves open, the first device decides.
    """

    version: Literal[1] = 1
    name: Name
    model: ModelDescription
    strategy: StrategyName
    stages: Annotated[tuple[Stage, ...], Field(min_length=1, max_length=MAX_STAGES)]
    training: Training = Training()
    cohort: Cohort = Cohort()
    self_tuning: SelfTuning | None = None
    calibration: Calibration | None = None
    device_modalities: Annotated[
        tuple[Annotated[tuple[Name, ...], Field(min_length=1, max_length=64)], ...], Field(max_length=1000)
    ] = ()
    zero_init: bool = False
    aggregation: AnyRule = Mean()
    server_learning_rate: PositiveFloat = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data_card: DataCard | None = None

    @model_validator(mode="after")
    def _stages_fit_the_model(self) -> "Plan":
        known = segment_names(self.model)
        groups = {"heads", *self.model.modalities}
        for position, stage in enumerate(self.stages):
            if stage.index != position:
                raise ValueError(f"stage {position} has index {stage.index}; stages count up from 0")
            unknown = [name for name in (*stage.active, *stage.frozen) if name not in known]
            if unknown:
                raise ValueError(f"stage {position} names segments that model {self.model.name!r} lacks: {unknown}")
            both = set(stage.active) & set(stage.frozen)
            if both:
                raise ValueError(f"stage {position} has segments both active and frozen: {sorted(both)}")
            if list(stage.active) != [name for name in known if name in stage.active]:
                raise ValueError(f"stage {position}: active segments must be in exchange order {known}")
            for modality in self.model.modalities:
                chain = prefix_chain(self.model, modality)
                present = stage.frozen_chain(self.model, modality) + stage.active_chain(self.model, modality)
                if present != chain[: len(present)] or not present:
                    raise ValueError(f"stage {position}: {modality} has {present}, which is no prefix of {chain}")
                lacking = [name for name in heads_of(self.model, modality) if name not in stage.active]
                if lacking:
                    raise ValueError(f"stage {position}: {lacking[0]} must be active, heads are trained in every stage")
            if strangers := sorted(set(stage.rate_scales) - groups):
                raise ValueError(f"stage {position}: rate_scales names {strangers[0]!r}, it may name {sorted(groups)}")
        for modality, augmentation in self.training.augmentation.items():
            if modality not in self.model.modalities:
                raise ValueError(f"augmentation names {modality!r}; the model has {list(self.model.modalities)}")
            kind = self.model.encoder(modality).input.kind
            if kind == "text_tokens" and augmentation != Augmentation(erase=augmentation.erase):
                raise ValueError(f"augmentation of {modality!r}: texts take erase alone, no other change")
            if augmentation.flip and kind not in ("image_patches", "image"):
                raise ValueError(f"augmentation of {modality!r}: only images can be flipped, and it is {kind}")
        if self.data_card is not None and (fault := self.data_card.misfit(self.model)):
            raise ValueError(f"data_card {fault}")
        if not any(stage.rounds for stage in self.stages):
            raise ValueError("every stage has 0 rounds: nothing would be trained")
        return self

    @property
    def embeds_first(self) -> bool:
        """Whether a step embeds all its micro-batches before it differentiates them (`lamina.bundles.manifest`): the loss
        compares samples, and they are not in memory together. It is then embed, loss, backward instead of one program."""
        return self.model.objective.kind != "supervised" and self.training.samples_in_memory < self.training.batch_size

    @property
    def passes_of_a_step(self) -> int:
        """Forward passes that training an active segment on one sample costs, the backward pass counting for two."""
        return 4 if self.embeds_first else 3

    @model_validator(mode="after")
    def _can_be_combined(self) -> "Plan":
        for fault in _conflicts(self):
            raise ValueError(fault)
        return self


def _conflicts(plan: Plan) -> Iterator[str]:
    """What cannot be combined, with the reason and the way out."""
    model, training, objective = plan.model, plan.training, plan.model.objective
    has_prefix = any(stage.frozen for stage in plan.stages)
    if objective.kind == "self_supervised":
        views = training.features.views
        if not training.augmentation:
            yield "the self-supervised objective compares two augmented views of an example: give training.augmentation"
        if views < 2 or views % 2:
            yield f"the self-supervised objective takes views in pairs: features.views must be even, it is {views}"
        if objective.is_held and training.micro_batch not in (None, training.batch_size):
            yield (
                "micro_batch: moon and align compare with the model of another time, and their programs take a whole batch; "
                "leave these terms out, or lower batch_size"
            )
        if plan.device_modalities:
            yield "device_modalities: a self-supervised model has one modality, which every device must have"
    if objective.kind == "supervised" and objective.distill and plan.strategy != "layerwise":
        yield "distill: only layerwise stages have a teacher, the heads of the stage before on the same frozen features"
    if training.depth_dropout:
        if plan.strategy != "layerwise":
            yield f"depth_dropout drops frozen layers, and strategy {plan.strategy!r} has none: use layerwise"
        for encoder in model.encoders:
            if len({encoder.feature_shape(depth) for depth in range(encoder.layers + 1)}) > 1:
                yield f"depth_dropout leaves layers out, but the features of {encoder.modality} change shape between layers"
        attached = max(len([n for n in stage.active if f"{m}.layers." in n]) for stage in plan.stages for m in model.modalities)
        if training.depth_dropout.budget <= attached:
            yield f"depth_dropout.budget {training.depth_dropout.budget} must be above the {attached} layers that are active"
    if plan.calibration:
        if plan.calibration.data is None:
            yield "calibration trains on data of the server's own: name it in calibration.data, or leave calibration out"
        if plan.strategy == "layerwise" and training.features.keep == "stage":
            yield (
                "calibration changes the prefix in every round, so features cannot be kept over a stage: set features.keep to "
                "'round' or 'none'"
            )
        if training.depth_dropout:
            yield "calibration trains all layers together, depth_dropout leaves some out: choose one"
    if fault := plan.aggregation.fault(plan.server_learning_rate):
        yield f"aggregation: {fault}"
    for subset in plan.device_modalities:
        strangers = sorted(set(subset) - set(model.modalities))
        if strangers:
            yield f"device_modalities names {strangers[0]!r}; the model has {list(model.modalities)}"
        in_order = tuple(modality for modality in model.modalities if modality in subset)
        if subset != in_order or len(subset) == len(model.modalities):
            yield f"device_modalities: {list(subset)} must be some of {list(model.modalities)}, in that order, and not all"
    if len(set(plan.device_modalities)) != len(plan.device_modalities):
        yield "device_modalities names a set twice"
    if objective.kind == "contrastive" and plan.device_modalities:
        yield from _view_conflicts(plan)
    if plan.zero_init and any(isinstance(encoder, ModuleEncoder) for encoder in model.encoders):
        yield "zero_init is for the built-in family; layers of a factory begin as the identity with options = { gated = true }"
    if plan.zero_init and not has_prefix and plan.strategy == "end_to_end":
        yield "zero_init is for layers that are attached later, and strategy 'end_to_end' attaches all at once"


def _view_conflicts(plan: Plan) -> Iterator[str]:
    """What a contrastive plan lacks for devices with one modality, which have no pairs (`ModelDescription.of_device`)."""
    views = plan.training.features.views
    for modality in sorted({modality for subset in plan.device_modalities for modality in subset}):
        if plan.training.augmentation.get(modality, Augmentation()) == Augmentation():
            yield (
                f"device_modalities: a device with {modality} alone has no pairs and compares two augmented views of an "
                f"example, which would be equal: give training.augmentation.{modality} (texts: erase), or leave the set out"
            )
    if views < 2 or views % 2:
        yield (
            "device_modalities: a device with one modality has no pairs and compares two views of an example: "
            f"training.features.views must be even, it is {views}"
        )
