"""Every objective, fusion and further term of a loss: programs against eager autograd of the whole, uncut model.

The expected losses are written out here a second time, from the formulas (methods, sections 1.2, 2.1 and 2.2) and with
PyTorch's own functions. Copies that a program takes from another time come from another model, so that none can be taken for
the weights. ExecuTorch lowers for seconds and has nothing of its own in these losses, so it runs one of each kind.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.graphs.cut import find_segments
from export.inputs import example_inputs, raw_input
from export.models.models import build_model
from lamina.bundles.bundle import blob_path
from lamina.bundles.manifest import ENGINES, LABEL, Manifest, gradient_input, second_view
from lamina.names import key_of
from lamina.plans.model import (
    AudioFrames,
    Contrastive,
    Encoder,
    ModelDescription,
    Objective,
    Projection,
    SelfSupervised,
    SensorWindows,
    Supervised,
)
from lamina.plans.plan import Augmentation, FeatureStore, Plan, Stage, Training
from lamina.plans.segments import HEAD, TensorSpec, classifier, norm, predictor, projection
from lamina.plans.strategies import make_stages
from tests.small_plans import shared_bundle

TOLERANCE = 1e-5
BATCH = 3
CLASSES = 2  # few, so that a class comes more than once in a batch
# Lowering to ExecuTorch takes up to minutes: the one with references is lowered here, and every export compares each of its
# programs with eager PyTorch by itself (`export.lowering.parity`).
ALL, SOME = ENGINES, ("onnxruntime", "torch")
_SIZES = {"width": 8, "heads": 2, "layers": 1}
AUDIO = Encoder(modality="audio", input=AudioFrames(frames=3, coefficients=4), **_SIZES)
MOTION = Encoder(modality="motion", input=SensorWindows(channels=2, samples=6, patch=3), **_SIZES)
DEEP = MOTION.model_copy(update={"layers": 2})
VIEWS = {"features": FeatureStore(views=2), "augmentation": {"motion": Augmentation(noise=0.1)}}


def plan_of(name: str, objective: Objective, *encoders: Encoder, strategy: str = "end_to_end", **settings: object) -> Plan:
    model = ModelDescription(name=name, encoders=encoders, projection=Projection(hidden=8, output=6), objective=objective)
    stages = make_stages(model, strategy, rounds=2, learning_rate=0.1, freeze_stems=strategy == "layerwise")
    return Plan(
        name=name,
        model=model,
        strategy=strategy,
        stages=stages,
        training=Training(
            batch_size=BATCH, **(VIEWS if objective.kind == "self_supervised" else {}), **settings.pop("training", {})
        ),
        **settings,
    )


def fused(fusion: str, **terms: object) -> Plan:
    objective = Supervised(classes=CLASSES, fusion=fusion, **terms)
    return plan_of(fusion if not terms else "terms", objective, AUDIO, MOTION, device_modalities=(("motion",),))


PLANS = {
    plan.name: (plan, engines)
    for plan, engines in (
        (plan_of("simclr", SelfSupervised(method="simclr"), MOTION), SOME),
        (plan_of("moco", SelfSupervised(method="moco", predictor_hidden=8), MOTION), ALL),
        (plan_of("byol", SelfSupervised(method="byol", predictor_hidden=8), MOTION), SOME),
        (plan_of("moon", SelfSupervised(method="simclr", moon=0.7, align=0.4), MOTION), SOME),
        (plan_of("distill", Supervised(classes=CLASSES, distill=0.6), DEEP, strategy="layerwise"), SOME),
        (fused("gated"), SOME),
        (fused("sum"), SOME),
        (fused("self_attention"), SOME),
        (fused("co_attention"), SOME),
        (fused("concat", blend={"audio": 0.5, "motion": 0.25}, align=0.3), SOME),
        (plan_of("classes", Contrastive(temperature=0.2, classes=CLASSES), AUDIO, MOTION), SOME),
    )
}
MICRO = {
    plan.name: (plan, engines)
    for plan, engines in (
        (
            plan_of("classes_micro", Contrastive(temperature=0.2, classes=CLASSES), AUDIO, MOTION, training={"micro_batch": 2}),
            SOME,
        ),
        (plan_of("simclr_micro", SelfSupervised(temperature=0.2), MOTION, training={"micro_batch": 2}), ALL),
        (plan_of("moco_micro", SelfSupervised(method="moco", predictor_hidden=8), MOTION, training={"micro_batch": 2}), ALL),
        (plan_of("byol_micro", SelfSupervised(method="byol", predictor_hidden=8), MOTION, training={"micro_batch": 2}), SOME),
    )
}


def unit(z: Tensor) -> Tensor:
    return z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def nce(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    scores = torch.exp(unit(q) @ unit(k).T / temperature)
    return -(scores.diagonal() / scores.sum(1)).log().mean()


@dataclass
class Eager:
    """The uncut model in one stage: what it gives for one view of every modality that is present."""

    model: nn.Module
    manifest: Manifest
    stage: Stage
    present: tuple[str, ...]
    features: dict[str, Tensor] = field(default_factory=dict)
    """What the active segments take, by the name of the batch input."""

    def __post_init__(self) -> None:
        self.plan = self.manifest.plan
        self.segments = find_segments(self.model, self.plan.model)
        self.objective = self.plan.model.objective

    def pooled(self, modality: str, raw: Tensor, name: str) -> Tensor:
        x = raw
        for segment in self.stage.frozen_chain(self.plan.model, modality):
            x = self.segments[segment](x).detach()
        self.features[name] = x
        for segment in self.stage.active_chain(self.plan.model, modality):
            x = self.segments[segment](x)
        return self.segments[norm(modality)](x).mean(dim=1)

    def project(self, modality: str, pooled: Tensor) -> Tensor:
        return self.segments[projection(modality)](pooled)

    def logits(self, embeddings: dict[str, Tensor]) -> Tensor:
        return joined(self.objective.fusion, self.segments[HEAD], embeddings, self.plan.model.modalities)

    def weights(self) -> list[nn.Parameter]:
        names = self.manifest.exchange(self.stage.index, () if self.present == self.plan.model.modalities else self.present)
        return [value for name in names for value in self.segments[name].parameters()]

    def arrays(self) -> list[np.ndarray]:
        return [value.detach().numpy() for value in self.weights()]


def joined(fusion: str, head: nn.Module, embeddings: dict[str, Tensor], modalities: tuple[str, ...]) -> Tensor:
    """Logits by the formulas of `export.objectives.fusions`; attention and gates go over the modalities that are there."""
    like = next(iter(embeddings.values()))
    z = [embeddings.get(modality, torch.zeros_like(like)) for modality in modalities]
    here = [index for index, modality in enumerate(modalities) if modality in embeddings]
    both = torch.cat(z, dim=1)
    if fusion == "concat":
        return F.linear(both, head.weight, head.bias)
    if fusion == "sum":
        return head.out(torch.cat([both, sum(z)], dim=1))
    if fusion == "gated":
        gate = torch.softmax(head.gate(both)[:, here], dim=1)
        return head.out(torch.cat([both, sum(gate[:, i, None] * head.values[m](z[m]) for i, m in enumerate(here))], dim=1))
    if fusion == "self_attention":
        tokens = torch.stack([z[m] for m in here], dim=1)
        mixed = head.mix(F.scaled_dot_product_attention(head.query(tokens), head.key(tokens), head.value(tokens)))
        for i, m in enumerate(here):
            z[m] = z[m] + mixed[:, i]
        return head.out(torch.cat(z, dim=1))
    first, second = z
    scores = torch.einsum("bi,bj->bij", torch.tanh(head.score(first)), second)
    attended = [torch.einsum("bij,bi->bj", scores.softmax(1), first), torch.einsum("bij,bj->bi", scores.softmax(2), second)]
    if len(here) < 2:
        attended = [torch.zeros_like(first)] * 2
    return head.out(torch.cat([both, *attended], dim=1))


def supervised_step(eager: Eager, others: dict[str, Eager], raw: dict[str, Tensor], is_judged: bool) -> tuple[Tensor, int]:
    objective, label = eager.objective, raw[LABEL]
    pooled = {m: eager.pooled(m, raw[m], m) for m in eager.present}
    z = {m: eager.project(m, pooled[m]) for m in eager.present}
    logits = eager.logits(z)
    loss = F.cross_entropy(logits, label)
    if not is_judged:
        for m, weight in objective.blend.items():
            if m in z:
                loss = loss + weight * F.cross_entropy(eager.segments[classifier(m)](z[m]), label)
        if objective.align:
            for m in z:
                received = others["start"].project(m, pooled[m]).detach()
                loss = loss + objective.align * (1 - (unit(z[m]) * unit(received)).sum(1)).mean()
        if objective.distill and eager.stage.index:
            teacher, t = others["teacher"], objective.distill_temperature
            taught = {}
            for m in eager.present:
                taught[m] = teacher.project(m, teacher.segments[norm(m)](eager.features[m]).mean(1))
            wanted = teacher.logits(taught).detach()
            kl = F.kl_div((logits / t).log_softmax(1), (wanted / t).log_softmax(1), reduction="batchmean", log_target=True)
            loss = loss + objective.distill * t * t * kl
    return loss, int((logits.argmax(1) == label).sum())


def two_views_step(eager: Eager, others: dict[str, Eager], raw: dict[str, Tensor], is_judged: bool) -> tuple[Tensor, int]:
    objective, (m,) = eager.objective, eager.present
    t, names = objective.temperature, (m, second_view(m))

    def projected(model: Eager) -> list[Tensor]:
        # Copies stand in for active segments alone: what is frozen is the same for all.
        return [model.project(m, model.pooled(m, raw[name], name)) for name in names]

    z = projected(eager)
    if objective.method == "simclr":
        q = k = z
        both = unit(torch.cat(z))
        size = len(both)
        scores = torch.exp(both @ both.T / t) * (1 - torch.eye(size))
        loss = -(scores[torch.arange(size), torch.arange(size).roll(size // 2)] / scores.sum(1)).log().mean()
    else:
        q = [eager.segments[predictor(m)](each) for each in z]
        k = [each.detach() for each in (z if is_judged else projected(others["momentum"]))]
        if objective.method == "moco":
            loss = nce(q[0], k[1], t) + nce(q[1], k[0], t)
        else:
            loss = sum((2 - 2 * (unit(a) * unit(b)).sum(1)).mean() for a, b in ((q[0], k[1]), (q[1], k[0])))
    if objective.moon and not is_judged:
        start, previous = ([each.detach() for each in projected(others[kind])] for kind in ("start", "previous"))
        for own, near, far in zip(z, start, previous, strict=True):
            to = [torch.exp((unit(own) * unit(each)).sum(1) / t) for each in (near, far)]
            loss = loss + objective.moon * 0.5 * -(to[0] / (to[0] + to[1])).log().mean()
            loss = loss + objective.align * 0.5 * nce(own, near, t)
    return loss, int(((unit(q[0]) @ unit(k[1]).T).argmax(1) == torch.arange(len(q[0]))).sum())


def contrastive_step(eager: Eager, others: dict[str, Eager], raw: dict[str, Tensor], is_judged: bool) -> tuple[Tensor, int]:
    a, b = (unit(eager.project(m, eager.pooled(m, raw[m], m))) for m in eager.present)
    similarity, label = a @ b.T / eager.objective.temperature, raw[LABEL]
    terms = []
    for scores in (similarity, similarity.T):
        logs = scores.log_softmax(1)
        terms += [-logs[i][label == label[i]].mean() for i in range(len(label))]
    return sum(terms) / len(terms), int((label[similarity.argmax(1)] == label).sum())


STEPS: dict[str, Callable[..., tuple[Tensor, int]]] = {
    "supervised": supervised_step,
    "self_supervised": two_views_step,
    "contrastive": contrastive_step,
}


def random_model(manifest: Manifest, seed: int) -> nn.Module:
    """Weights that are nowhere 0 or 1, so that no term of a gradient hides."""
    model = build_model(manifest.plan.model, 0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def raw_batch(manifest: Manifest, batch: int, seed: int) -> dict[str, Tensor]:
    model = manifest.plan.model
    specs = [raw_input(encoder) for encoder in model.encoders]
    if model.objective.kind == "self_supervised":
        specs += [spec.model_copy(update={"name": second_view(spec.name)}) for spec in specs]
    else:
        specs.append(TensorSpec(name=LABEL, shape=(), dtype="int64"))
    return dict(zip((spec.name for spec in specs), example_inputs(model, tuple(specs), batch, seed), strict=True))


def distance(given: np.ndarray, expected: Tensor) -> float:
    assert given.shape == tuple(expected.shape)
    return float(np.abs(given - expected.detach().numpy()).max())


def check(engine, folder: Path, manifest: Manifest, digest: str, stage: Stage, present: tuple[str, ...], role: str) -> None:
    """The program against the uncut model, with two sets of weights and a batch of one, a partial and a full one."""
    program = manifest.programs[digest].model_copy(update={"role": role})
    loaded = engine.load(blob_path(folder, digest), program)
    for seed, batch in ((1, BATCH), (2, BATCH - 1), (2, 1)):
        eager = Eager(random_model(manifest, seed), manifest, stage, present)
        others = {}
        for number, reference in enumerate(program.references):
            others[reference.kind] = Eager(random_model(manifest, 100 + 10 * number + seed), manifest, stage, present)
            for name in stage.frozen:  # of these there is one
                others[reference.kind].segments[name] = eager.segments[name]
        raw = raw_batch(manifest, batch, seed)
        loss, correct = STEPS[eager.objective.kind](eager, others, raw, role == "eval")
        copies = [others[reference.kind].arrays()[place] for reference in program.references for place in reference.tensors]
        inputs = [eager.features.get(spec.name, raw[spec.name]).numpy() for spec in program.inputs]
        given = loaded.run([*eager.arrays(), *copies, *inputs])
        assert distance(given[0], loss) <= TOLERANCE, (seed, batch)
        assert int(given[1]) == correct
        assert len(given) == 2 + (len(eager.weights()) if role == "train" else 0)
        if role == "train":
            # A modality that is absent leaves some of a head unused: its gradient is exactly zero, and the program says so.
            expected = torch.autograd.grad(loss, eager.weights(), allow_unused=True)
            for spec, own, value in zip(program.weights, given[2:], expected, strict=True):
                if value is None:
                    assert not own.any() and own.shape == spec
                else:
                    assert distance(own, value) <= TOLERANCE, (stage.index, seed, batch)
    loaded.close()


@pytest.fixture(params=PLANS)
def bundle(request, engine, shared_folder: Path, program_cache: Path) -> tuple[Path, Manifest]:
    plan, engines = PLANS[request.param]
    if engine.name not in engines:
        pytest.skip(f"{plan.name} is not lowered for {engine.name}: it would only take time")
    return shared_bundle(plan, engines, shared_folder, program_cache)


def test_training_programs_give_the_loss_and_gradients_of_the_formulas(engine, bundle):
    folder, manifest = bundle
    for stage, programs in zip(manifest.plan.stages, manifest.stages, strict=True):
        check(engine, folder, manifest, programs.train[engine.name], stage, manifest.plan.model.modalities, "train")
        for part in programs.partial:
            check(engine, folder, manifest, part.train[engine.name], stage, part.modalities, "train")


def test_evaluation_programs_give_the_main_term_alone_and_take_no_references(engine, bundle):
    folder, manifest = bundle
    for stage, programs in zip(manifest.plan.stages, manifest.stages, strict=True):
        assert manifest.programs[programs.eval[engine.name]].references == ()
        check(engine, folder, manifest, programs.eval[engine.name], stage, manifest.plan.model.modalities, "eval")
        for part in programs.partial:
            check(engine, folder, manifest, part.eval[engine.name], stage, part.modalities, "eval")


@pytest.mark.parametrize("name", MICRO)
def test_micro_batches_have_the_gradient_of_the_batch(name, engine, shared_folder, program_cache):
    plan, engines = MICRO[name]
    if engine.name not in engines:
        pytest.skip(f"{name} is not lowered for {engine.name}: it would only take time")
    folder, manifest = shared_bundle(plan, engines, shared_folder, program_cache)
    (stage,), (programs,) = manifest.plan.stages, manifest.stages
    digests = {"embed": programs.eval, "loss": manifest.loss_programs, "backward": programs.train}
    found = {role: manifest.programs[each[engine.name]] for role, each in digests.items()}
    modalities = manifest.plan.model.modalities
    parts = modalities if len(modalities) == 2 else (*modalities, second_view(modalities[0]))  # a pair, or two views
    has_label = manifest.plan.model.labels is not None
    has_keys = getattr(manifest.plan.model.objective, "has_predictor", False)
    compared = [*parts, *(key_of(part) for part in parts if has_keys)]
    assert [spec.name for spec in found["loss"].inputs] == [*compared, *[LABEL][:has_label]]
    assert [spec.name for spec in found["embed"].inputs] == [*parts]
    assert [spec.name for spec in found["backward"].inputs] == [*parts, *map(gradient_input, parts)]
    loaded = {role: engine.load(blob_path(folder, program.blob), program) for role, program in found.items()}
    eager, raw = Eager(random_model(manifest, 1), manifest, stage, modalities), raw_batch(manifest, BATCH, 1)
    others = {each.kind: Eager(random_model(manifest, 2), manifest, stage, modalities) for each in found["embed"].references}
    assert list(others) == ["momentum"][:has_keys] and not found["backward"].references
    copies = [others[each.kind].arrays()[place] for each in found["embed"].references for place in each.tensors]
    loss, correct = STEPS[eager.objective.kind](eager, others, raw, False)
    arrays = {name: value.numpy() for name, value in raw.items()}
    pieces = [slice(0, 2), slice(2, BATCH)]
    # The outputs of a program are only good until it runs again.
    embedded = [
        [z.copy() for z in loaded["embed"].run([*eager.arrays(), *copies, *(arrays[part][piece] for part in parts)])]
        for piece in pieces
    ]
    z = [np.concatenate(each) for each in zip(*embedded, strict=True)]
    given = [value.copy() for value in loaded["loss"].run([*z, *(arrays[LABEL] for _ in range(has_label))])]
    assert distance(given[0], loss) <= TOLERANCE and int(given[1]) == correct
    assert len(given) == 2 + len(compared)
    arrays |= {gradient_input(part): value for part, value in zip(parts, given[2:4], strict=True)}
    total = [np.zeros(value.shape, np.float32) for value in eager.weights()]
    for piece in pieces:
        batch = [np.ascontiguousarray(arrays[spec.name][piece]) for spec in found["backward"].inputs]
        total = [a + b for a, b in zip(total, loaded["backward"].run([*eager.arrays(), *batch]), strict=True)]
    expected = torch.autograd.grad(loss, eager.weights())
    assert max(distance(a, b) for a, b in zip(total, expected, strict=True)) <= TOLERANCE
    for program in loaded.values():
        program.close()
