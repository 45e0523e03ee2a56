"""Devices with one modality of a contrastive model: their programs against SimCLR, written out in eager PyTorch.

The expected losses are written here a second time, from the formula of NT-Xent, on the uncut model: two views of a batch go
through one modality, and each of the 2 x batch embeddings has to find its other view among all others.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.graphs.cut import find_segments
from export.models.models import build_model
from lamina.bundles.bundle import blob_path
from lamina.bundles.manifest import EngineName, Manifest, Program, gradient_input
from lamina.names import ANY_MODALITY, second_view
from lamina.plans.model import Contrastive, Encoder, ImagePatches, ModelDescription, Projection, TextTokens
from lamina.plans.plan import Augmentation, FeatureStore, Plan, Stage, StrategyName, Training
from lamina.plans.segments import norm, projection
from lamina.plans.strategies import make_stages
from tests.small_plans import shared_bundle

TOLERANCE = 1e-5
TEMPERATURE = 0.2
VOCABULARY, LENGTH = 7, 4
SETS = (("image",), ("text",))
# Lowering takes long, and every export compares each of its programs by itself: what is lowered here are the programs that
# only these plans have, for one modality. Those of a whole batch are SimCLR's, which test_objectives lowers.
LOWERED: dict[str, tuple[EngineName, ...]] = {"views_whole": ("torch",), "views_micro": ("onnxruntime", "torch")}


def plan_of(
    name: str, layers: int, strategy: StrategyName, batch_size: int, micro_batch: int | None, sets: Sequence[tuple[str, ...]]
) -> Plan:
    sizes = {"width": 8, "heads": 2, "layers": layers}
    model = ModelDescription(
        name=name,
        encoders=(
            # As many tokens as the text has: their later layers are then the same programs.
            Encoder(modality="image", input=ImagePatches(channels=1, height=4, width=4, patch=2), **sizes),
            Encoder(modality="text", input=TextTokens(vocabulary=VOCABULARY, length=LENGTH), **sizes),
        ),
        projection=Projection(hidden=8, output=6),
        objective=Contrastive(temperature=TEMPERATURE, classes=3 if micro_batch else None),
    )
    return Plan(
        name=name,
        model=model,
        strategy=strategy,
        stages=make_stages(model, strategy, rounds=2, learning_rate=0.1),
        training=Training(
            batch_size=batch_size,
            micro_batch=micro_batch,
            features=FeatureStore(views=2),
            augmentation={"image": Augmentation(noise=0.1), "text": Augmentation(erase=0.5)},
        ),
        device_modalities=tuple(sets),
    )


WHOLE = plan_of("views_whole", 2, "layerwise", 3, None, SETS)
MICRO = plan_of("views_micro", 1, "end_to_end", 5, 2, SETS[1:])


def views_of(modality: str, count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if modality == "text":
        return [torch.randint(VOCABULARY, (count, LENGTH), generator=generator) for _ in range(2)]
    return [torch.randn(count, 1, 4, 4, generator=generator) for _ in range(2)]


def nt_xent(views: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Loss, and how many of the first views find their own second one before those of the others."""
    a, b = ([row / (row.square().sum() + 1e-6).sqrt() for row in view] for view in views)
    everything = [*a, *b]
    terms = []
    for i, one in enumerate(everything):
        other = (i + len(a)) % len(everything)
        others = sum(torch.exp((one @ each) / TEMPERATURE) for j, each in enumerate(everything) if j != i)
        terms.append(-torch.log(torch.exp((one @ everything[other]) / TEMPERATURE) / others))
    found = sum(max(range(len(b)), key=lambda j: (one @ b[j]).item()) == i for i, one in enumerate(a))
    return sum(terms) / len(terms), found


class Eager:
    """One modality of the uncut model, as a stage trains it; `inputs` are what the active segments take of each view."""

    def __init__(self, manifest: Manifest, stage: Stage, modality: str, seed: int) -> None:
        model = build_model(manifest.plan.model, 0)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        self.segments = find_segments(model, manifest.plan.model)
        self.model, self.stage, self.modality = manifest.plan.model, stage, modality
        self.names = manifest.exchange(stage.index, (modality,))
        self.inputs: list[Tensor] = []

    def embed(self, raw: Tensor) -> Tensor:
        x = raw
        for name in self.stage.frozen_chain(self.model, self.modality):
            x = self.segments[name](x).detach()
        self.inputs.append(x)
        for name in self.stage.active_chain(self.model, self.modality):
            x = self.segments[name](x)
        pooled = self.segments[norm(self.modality)](x).mean(dim=1)
        return self.segments[projection(self.modality)](pooled)

    def weights(self) -> list[nn.Parameter]:
        return [value for name in self.names for value in self.segments[name].parameters()]

    def arrays(self) -> list[np.ndarray]:
        return [value.detach().numpy() for value in self.weights()]


def difference(given: Sequence[np.ndarray], expected: Sequence[Tensor]) -> float:
    pairs = list(zip(given, expected, strict=True))
    assert all(a.shape == tuple(b.shape) for a, b in pairs)
    return max(float(np.abs(a - b.detach().numpy()).max()) for a, b in pairs)


def bundle_of(plan: Plan, shared_folder: Path, program_cache: Path) -> tuple[Path, Manifest]:
    return shared_bundle(plan, LOWERED[plan.name], shared_folder, program_cache)


def program_of(manifest: Manifest, digest: str, role: str) -> Program:
    return manifest.programs[digest].model_copy(update={"role": role})


@pytest.mark.parametrize("engine", LOWERED[WHOLE.name], indirect=True)
def test_a_program_of_one_modality_has_the_loss_and_gradients_of_two_views(engine, shared_folder, program_cache):
    folder, manifest = bundle_of(WHOLE, shared_folder, program_cache)
    assert [part.modalities for programs in manifest.stages for part in programs.partial] == [*SETS, *SETS]
    for stage, programs in zip(manifest.plan.stages, manifest.stages, strict=True):
        for part in programs.partial:
            for role in ("train", "eval"):
                program = program_of(manifest, getattr(part, role)[engine.name], role)
                assert [spec.name for spec in program.inputs] == [ANY_MODALITY, second_view(ANY_MODALITY)]
                loaded = engine.load(blob_path(folder, program.blob), program)
                for seed, count in ((1, 3), (2, 2), (3, 1)):
                    eager = Eager(manifest, stage, part.modalities[0], seed)
                    views = views_of(part.modalities[0], count, seed)
                    loss, found = nt_xent([eager.embed(view) for view in views])
                    given = loaded.run([*eager.arrays(), *(view.numpy() for view in eager.inputs)])
                    assert abs(float(given[0]) - loss.item()) <= TOLERANCE
                    assert int(given[1]) == found
                    if role == "train":
                        assert difference(given[2:], torch.autograd.grad(loss, eager.weights())) <= TOLERANCE
                    else:
                        assert len(given) == 2
                loaded.close()


@pytest.mark.parametrize("engine", LOWERED[WHOLE.name], indirect=True)
def test_equal_layers_of_two_modalities_are_one_program(engine, shared_folder, program_cache):
    _, manifest = bundle_of(WHOLE, shared_folder, program_cache)
    first, second = ([part.train[engine.name] for part in programs.partial] for programs in manifest.stages)
    assert first[0] != first[1]  # an image and a text do not enter alike
    assert second[0] == second[1]


@pytest.mark.slow
@pytest.mark.parametrize("engine", LOWERED[MICRO.name], indirect=True)
def test_two_views_in_micro_batches_have_the_gradient_of_the_batch_and_need_no_label(engine, shared_folder, program_cache):
    folder, manifest = bundle_of(MICRO, shared_folder, program_cache)
    batch, micro = MICRO.training.batch_size, MICRO.training.samples_in_memory
    (stage,), (programs,) = manifest.plan.stages, manifest.stages
    for part in programs.partial:
        digests = {"embed": part.eval, "loss": manifest.view_loss_programs, "backward": part.train}
        found = {role: program_of(manifest, each[engine.name], role) for role, each in digests.items()}
        views = [ANY_MODALITY, second_view(ANY_MODALITY)]
        assert [spec.name for spec in found["loss"].inputs] == [spec.name for spec in found["embed"].inputs] == views
        assert [spec.name for spec in found["backward"].inputs] == [*views, *map(gradient_input, views)]
        assert (found["loss"].max_batch, found["embed"].max_batch, found["backward"].max_batch) == (batch, micro, micro)
        loaded = {role: engine.load(blob_path(folder, program.blob), program) for role, program in found.items()}

        eager = Eager(manifest, stage, part.modalities[0], 1)
        loss, hits = nt_xent([eager.embed(view) for view in views_of(part.modalities[0], batch, 1)])
        inputs = [view.numpy() for view in eager.inputs]
        pieces = [slice(start, start + micro) for start in range(0, batch, micro)]
        parts = [loaded["embed"].run([*eager.arrays(), *(np.ascontiguousarray(v[p]) for v in inputs)]) for p in pieces]
        z = [np.concatenate([each[i].copy() for each in parts]) for i in range(2)]
        given = [value.copy() for value in loaded["loss"].run(z)]
        assert abs(float(given[0]) - loss.item()) <= TOLERANCE
        assert int(given[1]) == hits
        total = [np.zeros(value.shape, np.float32) for value in eager.weights()]
        for piece in pieces:
            taken = [np.ascontiguousarray(value[piece]) for value in (*inputs, *given[2:])]
            total = [a + b for a, b in zip(total, loaded["backward"].run([*eager.arrays(), *taken]), strict=True)]
        assert difference(total, torch.autograd.grad(loss, eager.weights())) <= TOLERANCE
        for program in loaded.values():
            program.close()


def test_the_manifest_says_that_it_is_our_own_choice(shared_folder, program_cache):
    _, manifest = bundle_of(WHOLE, shared_folder, program_cache)
    assert any("two views of each example (SimCLR), which is our own choice" in note for note in manifest.notes)
    assert manifest.view_loss_programs == {}
