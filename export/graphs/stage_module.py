"""The module that a stage trains, and its loss: the objective and the terms that the plan adds to it.

    module(*tensors of each reference, *batch inputs) -> (loss, correct), or one embedding (batch, output) for each modality,
                                                         or each view, and with keys those of the momentum copy

A reference (`lamina.names.Reference`) is a copy of some of the module's own tensors from another time. The copy runs through
the same layers, and no gradient goes through it; tensors that are never trained it shares with them. Which terms ask for which:

    momentum    moco, byol: chain, norm and projection make the keys
    start       align of a supervised objective: the projections; moon and align of a self-supervised one: all but the predictor
    previous    moon: the same
    teacher     distill: norm, projection and head of the previous stage, on what the active layers take
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from export.models.parameters import trained
from export.objectives import self_supervised as views
from export.objectives.fusions import classify
from export.objectives.objectives import apply_objective, cross_entropy, distillation
from lamina.bundles.manifest import ProgramReference
from lamina.names import Reference
from lamina.plans.model import ModelDescription, SelfSupervised, Supervised
from lamina.plans.plan import Stage
from lamina.plans.segments import HEAD, classifier, norm, predictor, projection

Parts = Mapping[int, Mapping[str, Tensor]]
"""Tensors that stand in for those of a part: place of the part -> name of the tensor -> tensor."""
_OWN: Parts = {}


@dataclass(frozen=True)
class Route:
    """The way of one modality: places of the parts that its input passes, and of its heads."""

    modality: str
    chain: tuple[int, ...]
    norm: int
    projection: int
    predictor: int | None
    classifier: int | None


@dataclass(frozen=True)
class Terms:
    """What the loss of a program has besides its main term.

    `blend` are the classifiers of single modalities. `held` are the terms that hold training to other weights: align, moon and
    distill (the last one only with `has_teacher`). Evaluation has neither, and the server's calibration has `blend` alone.
    """

    blend: bool = True
    held: bool = True
    has_teacher: bool = True


MAIN_TERM = Terms(blend=False, held=False, has_teacher=False)


def references_of(description: ModelDescription, stage: Stage, terms: Terms, *, is_judged: bool) -> dict[Reference, list[str]]:
    """Kind -> the segments whose tensors a program takes from another time, in the order of the program's arrays."""
    objective = description.objective
    encoding = [
        name
        for modality in description.modalities
        for name in (*stage.active_chain(description, modality), norm(modality), projection(modality))
    ]
    found: dict[Reference, list[str]] = {}
    if isinstance(objective, SelfSupervised):
        if objective.has_predictor and not is_judged:
            found["momentum"] = encoding
        if terms.held and (objective.moon or objective.align):
            found["start"] = encoding
        if terms.held and objective.moon:
            found["previous"] = encoding
    if isinstance(objective, Supervised) and terms.held:
        if objective.align:
            found["start"] = [projection(modality) for modality in description.modalities]
        if objective.distill and terms.has_teacher:
            found["teacher"] = [name(m) for m in description.modalities for name in (norm, projection)] + [HEAD]
    return found


class StageModule(nn.Module):
    """The active segments as `parts.0`, `parts.1`, ...: the names must not tell which layer of the model it is, so that
    stages of equal shape give the same graph."""

    def __init__(
        self,
        parts: nn.ModuleList,
        pools: Mapping[str, nn.Module],
        description: ModelDescription,
        stage: Stage,
        names: Sequence[str],
        terms: Terms,
        *,
        is_judged: bool,
        absent: Sequence[str] = (),
        until_embeddings: bool = False,
        with_keys: bool = False,
    ) -> None:
        """`parts` are the segments `names`, those of the stage without those of the modalities that are `absent`. `is_judged`:
        for evaluation, which has no momentum copy; its keys are the model's own. `until_embeddings` are what the loss takes and
        gradients go through; `with_keys`, also what it takes of the momentum copy."""
        super().__init__()
        self.parts = parts
        self.objective, self.terms, self.until_embeddings = description.objective, terms, until_embeddings
        self.order = description.modalities
        present = [modality for modality in description.modalities if modality not in absent]
        self.pools = nn.ModuleList(pools[modality] for modality in present)
        at = {name: place for place, name in enumerate(names)}
        self.routes = [
            Route(
                modality=m,
                chain=tuple(at[name] for name in stage.active_chain(description, m)),
                norm=at[norm(m)],
                projection=at[projection(m)],
                predictor=at.get(predictor(m)),
                classifier=at.get(classifier(m)),
            )
            for m in present
        ]
        self.head = at.get(HEAD)
        keys = [list(trained(part)) for part in parts]  # what is never trained is the same at all times: no copy of it
        has_references = with_keys or not until_embeddings
        wanted = references_of(description, stage, terms, is_judged=is_judged) if has_references else {}
        # (kind, (place of the part, name of the tensor) for each array)
        self.references = [
            (kind, [(at[name], key) for name in segments if name in at for key in keys[at[name]]])
            for kind, segments in wanted.items()
        ]
        first = [sum(map(len, keys[:place])) for place in range(len(keys))]
        self.reference_specs = tuple(
            ProgramReference(kind=kind, tensors=tuple(first[place] + keys[place].index(key) for place, key in tensors))
            for kind, tensors in self.references
            if tensors
        )

    def forward(self, *arrays: Tensor) -> tuple[Tensor, ...]:
        copies: dict[str, dict[int, dict[str, Tensor]]] = {kind: {} for kind, _ in self.references}
        rest = iter(arrays)
        for kind, places in self.references:
            for place, key in places:
                copies[kind].setdefault(place, {})[key] = next(rest)
        inputs = list(rest)
        if isinstance(self.objective, SelfSupervised):
            return self._two_views(self.objective, copies, *inputs[:2])
        pooled = [self._pooled(route, pool, x) for route, pool, x in self._present(inputs)]
        embeddings = [self._run(route.projection, z, _OWN) for route, z in zip(self.routes, pooled, strict=True)]
        if self.until_embeddings:
            return tuple(embeddings)
        label = inputs[len(self.routes)] if len(inputs) > len(self.routes) else None
        if not isinstance(self.objective, Supervised):
            return apply_objective(self.objective, None, embeddings, label)
        assert self.head is not None and label is not None
        logits = classify(self.parts[self.head], self._in_order(embeddings))
        loss, correct = cross_entropy(logits, label)
        for term in self._further(self.objective, copies, inputs, pooled, embeddings, logits, label):
            loss = loss + term
        return loss, correct

    def _further(
        self,
        objective: Supervised,
        copies: Mapping[str, Parts],
        inputs: Sequence[Tensor],
        pooled: Sequence[Tensor],
        embeddings: Sequence[Tensor],
        logits: Tensor,
        label: Tensor,
    ) -> Iterable[Tensor]:
        """The terms that the plan adds, each with its weight."""
        for route, z, features in zip(self.routes, embeddings, pooled, strict=True):
            if self.terms.blend and route.classifier is not None:
                own, _ = cross_entropy(self.parts[route.classifier](z), label)
                yield objective.blend[route.modality] * own
            if "start" in copies:
                received = self._run(route.projection, features.detach(), copies["start"])
                yield objective.align * (1 - views.cosine(z, received)).mean()
        if "teacher" in copies:
            teacher = copies["teacher"]
            taught = [
                self._run(route.projection, pool(self._run(route.norm, x, teacher)), teacher)
                for route, pool, x in self._present(inputs)
            ]
            assert self.head is not None
            judge = _inside(teacher.get(self.head, {}))
            wanted = functional_call(_Classify(self.parts[self.head]), judge, (self._in_order(taught),))
            yield objective.distill * distillation(objective.distill_temperature, wanted, logits)

    def _two_views(self, objective: SelfSupervised, copies: Mapping[str, Parts], a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        (route,), (pool,) = self.routes, self.pools
        temperature = objective.temperature

        def embed(x: Tensor, weights: Parts = _OWN) -> Tensor:
            return self._run(route.projection, self._pooled(route, pool, x, weights), weights)

        # Copies come first, so that what they compute on the way is gone before the activations are there that gradients need.
        far = {kind: (embed(a, weights), embed(b, weights)) for kind, weights in copies.items()}
        z = q = embed(a), embed(b)
        if route.predictor is not None:
            q = self.parts[route.predictor](z[0]), self.parts[route.predictor](z[1])
        if self.until_embeddings:
            return (*q, *far.get("momentum", ()))
        if route.predictor is None:
            loss, correct = views.simclr(temperature, *z), views.found_first(*z)
        else:
            k = far["momentum"] if "momentum" in far else (z[0].detach(), z[1].detach())
            loss, correct = views.against_keys(objective.method, temperature, q, k)
        if "previous" in far:
            pulls = [views.moon(temperature, *each) for each in zip(z, far["start"], far["previous"], strict=True)]
            loss = loss + objective.moon * 0.5 * (pulls[0] + pulls[1])
        if objective.align and "start" in far:
            pulls = [views.info_nce(temperature, *each) for each in zip(z, far["start"], strict=True)]
            loss = loss + objective.align * 0.5 * (pulls[0] + pulls[1])
        return loss, correct

    def _pooled(self, route: Route, pool: nn.Module, x: Tensor, weights: Parts = _OWN) -> Tensor:
        """What the projection takes."""
        for place in (*route.chain, route.norm):
            x = self._run(place, x, weights)
        pooled: Tensor = pool(x)
        return pooled

    def _run(self, place: int, x: Tensor, weights: Parts) -> Tensor:
        """One part, with its own tensors or those of a reference."""
        given = weights.get(place)
        y: Tensor = functional_call(self.parts[place], dict(given), (x,)) if given else self.parts[place](x)
        return y

    def _present(self, inputs: Sequence[Tensor]) -> list[tuple[Route, nn.Module, Tensor]]:
        return list(zip(self.routes, self.pools, inputs, strict=False))

    def _in_order(self, embeddings: Sequence[Tensor]) -> list[Tensor | None]:
        """One for each modality of the model, None for those that are absent."""
        found = {route.modality: z for route, z in zip(self.routes, embeddings, strict=True)}
        return [found.get(modality) for modality in self.order]


class _Classify(nn.Module):
    """A head of any kind that takes the list of embeddings."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, embeddings: list[Tensor | None]) -> Tensor:
        return classify(self.head, embeddings)


def _inside(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"head.{key}": value for key, value in weights.items()}


def copies_of(segments: Mapping[str, nn.Module], names: Sequence[str]) -> nn.ModuleList:
    """The parts of a stage: copies in evaluation mode."""
    return nn.ModuleList(deepcopy(segments[name]).eval() for name in names)


def random_references(module: StageModule) -> tuple[Tensor, ...]:
    """Tensors near the module's own, others for each reference: a program that mixes up two of them is then found out."""
    values = [value.detach() for value in trained(module).values()]
    found = []
    for number, reference in enumerate(module.reference_specs):
        generator = torch.Generator().manual_seed(10 + number)
        found += [values[place] + 0.05 * torch.randn(values[place].shape, generator=generator) for place in reference.tensors]
    return tuple(found)
