"""The model of a description: the built-in family of small multimodal transformers, or the user's encoders with our heads.

Every model goes through the same door (`export.graphs.cut`): `encoders[modality]` with `stem`, `layers`, `norm` and `pool`, a
`projections[modality]` each, and what the objective asks for: `predictors`, `classifiers`, a `head`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from export.faults.faults import Fault, memory_of, raise_first
from export.faults.mending import mended, mended_trunk, mending_faults
from export.models.adapters import adapt
from export.models.adapters.common import segments_of
from export.models.factory import call_factory, library_errors
from export.models.proofs import engine_safe, named_parts
from export.objectives.fusions import classify, make_head
from export.objectives.objectives import l2_normalise
from export.trunk import MeanTokens, Trunk
from lamina.errors import CutError
from lamina.plans.model import (
    AudioFrames,
    Encoder,
    ImagePatches,
    ModelDescription,
    ModuleEncoder,
    Projection,
    SelfSupervised,
    SensorWindows,
    Supervised,
    TextTokens,
)
from lamina.plans.plan import Plan
from lamina.plans.recipe import EncoderRecipe
from lamina.plans.segments import HEAD, classifier, heads_of, layer, norm, predictor, projection, stem


class Attention(nn.Module):
    """Multi-head self-attention in plain matrix products: a fused kernel has no exportable backward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width) -> the same
        batch, tokens, width = x.shape

        def split(t: Tensor) -> Tensor:  # -> (batch, heads, tokens, width per head)
            return t.reshape(batch, tokens, self.heads, width // self.heads).transpose(1, 2)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5
        mixed = torch.softmax(scores, dim=-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Layer(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, mlp_ratio * width)
        self.mlp_out = nn.Linear(mlp_ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp_out(nn.functional.gelu(self.mlp_in(self.mlp_norm(x))))


class ImageStem(nn.Module):
    """(batch, channels, height, width) -> (batch, patches, width): a patch convolution as reshape + Linear."""

    def __init__(self, spec: ImagePatches, width: int) -> None:
        super().__init__()
        self.patch = spec.patch
        self.embed = nn.Linear(spec.channels * spec.patch**2, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, spec.tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        p = self.patch
        x = x.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        return self.embed(x.reshape(batch, (height // p) * (width // p), channels * p * p)) + self.position


class FrameStem(nn.Module):
    """(batch, frames, coefficients) -> (batch, frames, width)."""

    def __init__(self, spec: AudioFrames, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(spec.coefficients, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, spec.tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x) + self.position


class SensorStem(nn.Module):
    """(batch, channels, samples) -> (batch, pieces, width)."""

    def __init__(self, spec: SensorWindows, width: int) -> None:
        super().__init__()
        self.patch = spec.patch
        self.embed = nn.Linear(spec.channels * spec.patch, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, spec.tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, samples = x.shape
        x = x.reshape(batch, channels, samples // self.patch, self.patch).permute(0, 2, 1, 3)
        return self.embed(x.reshape(batch, samples // self.patch, channels * self.patch)) + self.position


class TextStem(nn.Module):
    """(batch, length) int64 -> (batch, length, width)."""

    def __init__(self, spec: TextTokens, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(spec.vocabulary, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.position = nn.Parameter(0.02 * torch.randn(1, spec.tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x) + self.position


class EncoderModule(nn.Module):
    """stem -> layers -> norm -> pool."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.stem = trunk.stem
        self.layers = nn.ModuleList(trunk.layers)
        self.norm = trunk.norm
        self.pool = trunk.pool


class ProjectionHead(nn.Module):
    """(batch, width) -> (batch, output): a projection, or the predictor of MoCo and BYOL.

    Without batch norm, which the published heads have: its running statistics would be neither trained nor averaged as weights
    are, and engines do not train it.
    """

    def __init__(self, width: int, hidden: int, output: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, output)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.gelu(self.hidden(x)))


class MultimodalModel(nn.Module):
    """Encoders, projection heads and, for a supervised objective, a head on the joined projections
    (`export.objectives.fusions`).

    `trunks` are those of the encoders that are modules; the others are of the family.
    """

    def __init__(self, description: ModelDescription, trunks: Mapping[str, Trunk]) -> None:
        super().__init__()
        self.description = description
        own = {spec.modality: family_trunk(spec) for spec in description.encoders if isinstance(spec, Encoder)}
        chosen = {modality: own.get(modality) or trunks[modality] for modality in description.modalities}
        self.encoders = nn.ModuleDict({modality: EncoderModule(trunk) for modality, trunk in chosen.items()})
        self.projections = nn.ModuleDict(
            {
                spec.modality: make_projection(spec.width, description.projection, chosen[spec.modality].projection)
                for spec in description.encoders
            }
        )
        objective, output = description.objective, description.projection.output
        self.head: nn.Module | None = None
        if isinstance(objective, Supervised):
            self.head = make_head(objective.fusion, len(description.encoders), output, objective.classes)
        self.predictors, self.classifiers = nn.ModuleDict(), nn.ModuleDict()
        for modality in description.modalities:
            for name in heads_of(description, modality):
                if isinstance(objective, SelfSupervised) and name == predictor(modality):
                    self.predictors[modality] = ProjectionHead(output, objective.predictor_hidden, output)
                if isinstance(objective, Supervised) and name == classifier(modality):
                    self.classifiers[modality] = nn.Linear(output, objective.classes)

    def segments(self) -> dict[str, nn.Module]:
        """Segment name -> module, in exchange order."""
        found: dict[str, nn.Module] = {}
        for modality, encoder in self.encoders.items():
            found[stem(modality)] = encoder.stem
            found |= {layer(modality, index): block for index, block in enumerate(encoder.layers)}
            found[norm(modality)] = encoder.norm
            found[projection(modality)] = self.projections[modality]
            if modality in self.predictors:
                found[predictor(modality)] = self.predictors[modality]
            if modality in self.classifiers:
                found[classifier(modality)] = self.classifiers[modality]
        if self.head is not None:
            found[HEAD] = self.head
        return found

    def pool(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Raw inputs of every modality -> pooled features (batch, width)."""
        pooled = {}
        for modality, encoder in self.encoders.items():
            x = encoder.stem(inputs[modality])
            for block in encoder.layers:
                x = block(x)
            pooled[modality] = encoder.pool(encoder.norm(x))
        return pooled

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Raw inputs of every modality -> projections (batch, output)."""
        return {modality: self.projections[modality](x) for modality, x in self.pool(inputs).items()}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Raw inputs in the order of the description's encoders -> (logits,), the two normalised embeddings, or, of a
        self-supervised model, the pooled features (batch, width): its heads are for training alone."""
        given = dict(zip(self.encoders, inputs, strict=True))
        if isinstance(self.description.objective, SelfSupervised):
            return tuple(self.pool(given).values())
        embeddings = list(self.embed(given).values())
        if self.head is not None:
            return (classify(self.head, embeddings),)
        return tuple(l2_normalise(z) for z in embeddings)


def build_model(description: ModelDescription, seed: int, trunks: Mapping[str, Trunk] | None = None) -> MultimodalModel:
    """The model of a description; the same description and seed give the same weights.

    Encoders that are modules are made by their factories, with the weights that those give them, unless `trunks` has them;
    the rest is random. Layers beyond the description's are left out. Raises CutError if a factory makes something else than
    the description says.
    """
    if trunks is None:
        own = {spec.modality: spec for spec in description.encoders if isinstance(spec, ModuleEncoder)}
        trunks = checked_trunks(own, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MultimodalModel(description, trunks)


def zero_late_layers(segments: Mapping[str, nn.Module], plan: Plan) -> list[str]:
    """Makes each layer of the family that is attached after the first stage the identity, as `plan.zero_init` says, and gives
    their names: what its attention and its MLP add starts at zero."""
    first = {*plan.stages[0].active, *plan.stages[0].frozen}
    late = [name for name in segments if ".layers." in name and name not in first] if plan.zero_init else []
    for name in late:
        block = segments[name]
        if not isinstance(block, Layer):
            raise CutError(f"zero_init: {name} is a {type(block).__name__}, not a layer of the built-in family; leave it out")
        for linear in (block.attention.out, block.mlp_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    return late


def checked_trunks(encoders: Mapping[str, ModuleEncoder], seed: int) -> dict[str, Trunk]:
    """As `make_trunks`, with the layers that the plan wants. Raises the error of the first fault."""
    trunks = planned_trunks(encoders, seed)
    for trunk in trunks.values():
        raise_first(trunk.faults)
    return trunks


def planned_trunks(encoders: Mapping[str, ModuleEncoder], seed: int) -> dict[str, Trunk]:
    """As `make_trunks`, with the layers that the plan wants. Raises CutError where the factory makes fewer."""
    trunks = make_trunks(encoders, seed)
    for modality, spec in encoders.items():
        layers = trunks[modality].layers
        if len(layers) < spec.layers:
            raise CutError(f"{spec.factory} makes {len(layers)} layers, the plan says {spec.layers}: it was changed since")
        trunks[modality] = replace(trunks[modality], layers=layers[: spec.layers])
    return trunks


def make_trunks(encoders: Mapping[str, ModuleEncoder | EncoderRecipe], seed: int) -> dict[str, Trunk]:
    """Calls the factories of these modalities, and adapts what they make. What is wrong with single segments is in `faults`.

    A factory that makes a dict is called once for all of its modalities. Raises as `call_factory` and `adapt` do.
    """
    calls: list[tuple[str, Mapping[str, Any], object]] = []
    chosen: dict[str, object] = {}
    for modality, spec in encoders.items():
        factory, arguments = spec.factory or "", spec.arguments
        made = next((known for name, values, known in calls if (name, values) == (factory, arguments)), None)
        if made is None:
            made = call_factory(factory, arguments, seed)
            if isinstance(made, Mapping):
                calls.append((factory, arguments, made))
        chosen[modality] = _of_modality(made, modality, factory)
    trunks = {}
    for modality, spec in encoders.items():
        with library_errors(f"adapting what {spec.factory} makes for {modality}"):
            trunks[modality] = _adapted(chosen[modality], modality, spec.options)
    owners: dict[object, str] = {}
    for modality, spec in encoders.items():
        for key, value in _parameters(chosen[modality]):
            if not value.requires_grad:
                continue  # it stays equal by itself
            owner = owners.setdefault(memory_of(value), modality)
            if owner != modality:
                trunks[modality] = _shared_between(trunks[modality], modality, owner, key, spec.options)
                break
    return trunks


def _of_modality(made: object, modality: str, factory: str) -> object:
    if not isinstance(made, Mapping):
        return made
    if modality not in made:
        raise CutError(f"{factory} makes {sorted(made)}, and nothing for modality {modality!r}")
    return made[modality]


def _adapted(made: object, modality: str, options: Mapping[str, Any]) -> Trunk:
    """The trunk of a module, as engines can train it; tensors that they cannot take are mended, and faults."""
    doubled = [] if options.get("copy_shared") else list(_doubled(made, modality))
    own = mended_trunk(made) if isinstance(made, Trunk) else mended(made) if isinstance(made, nn.Module) else made
    trunk = adapt(own, **options)
    if isinstance(made, nn.Module | Trunk):
        parts = named_parts(modality, trunk)
        parts[norm(modality)] = nn.Sequential(parts[norm(modality)], trunk.pool)
        trunk = replace(trunk, faults=(*doubled, *mending_faults(made, modality, parts)))
    return engine_safe(trunk, modality)


def _doubled(made: object, modality: str) -> Iterator[Fault]:
    """Two parameters in one memory; a copy of the model, which is what lamina works on, has two memories."""
    owners: dict[object, tuple[str, Tensor]] = {}
    for key, value in _parameters(made):
        other, first = owners.setdefault(memory_of(value), (key, value))
        if first is not value and (first.requires_grad or value.requires_grad):
            reason = f"{other} and {key} are two parameters in one memory: trained apart, they would not stay one"
            remedy = "use one nn.Parameter under both names, or ask for copies by the encoder's option copy_shared = true"
            yield Fault(f"({modality})", reason, remedy)


def _parameters(made: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(made, Trunk):
        made = nn.ModuleList(segments_of(made))
    if isinstance(made, nn.Module):
        yield from made.named_parameters()


def _shared_between(trunk: Trunk, modality: str, owner: str, key: str, options: Mapping[str, Any]) -> Trunk:
    """Encoders are trained apart, so what two of them share becomes two copies, if the user asks for that."""
    if options.get("copy_shared"):
        return replace(trunk, notes=(*trunk.notes, f"{modality}: began as a copy of what it shares with {owner}."))
    reason = f"its parameter {key!r} is one of {owner}'s as well: trained apart, it would not stay one"
    remedy = "make a module for each modality, or ask for copies by the encoder's option copy_shared = true"
    return replace(trunk, faults=(*trunk.faults, Fault(f"({modality})", reason, remedy)))


def family_trunk(spec: Encoder) -> Trunk:
    return Trunk(
        stem=make_stem(spec),
        layers=tuple(Layer(spec.width, spec.heads, spec.mlp_ratio) for _ in range(spec.layers)),
        norm=nn.LayerNorm(spec.width),
        pool=MeanTokens(),
        input=spec.input,
    )


def make_projection(width: int, spec: Projection, own: nn.Module | None) -> nn.Module:
    """The encoder's own projection where the description asks for a single Linear, else ours with random weights."""
    if spec.hidden is not None:
        return ProjectionHead(width, spec.hidden, spec.output)
    return nn.Linear(width, spec.output, bias=False) if own is None else own


def make_stem(spec: Encoder) -> nn.Module:
    match spec.input:
        case ImagePatches():
            return ImageStem(spec.input, spec.width)
        case AudioFrames():
            return FrameStem(spec.input, spec.width)
        case SensorWindows():
            return SensorStem(spec.input, spec.width)
        case TextTokens():
            return TextStem(spec.input, spec.width)
