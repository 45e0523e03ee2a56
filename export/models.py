"""The built-in family of small multimodal transformers, written so that every engine can train them.

The rules that make a model exportable (attention by hand, patches by reshape, no batch-size constants, no dropout) are
kept here and nowhere else. Any other model goes through the same door: `encoders[modality]` with `stem`, `layers`,
`norm`, a `projections[modality]` each, and optionally a `head`.
"""

import torch
from torch import Tensor, nn

from lamina.model import AudioFrames, Encoder, ImagePatches, ModelDescription, Projection, SensorWindows, TextTokens
from lamina.segments import HEAD, layer, norm, projection, stem


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
    """stem -> layers -> norm -> mean over tokens."""

    def __init__(self, spec: Encoder) -> None:
        super().__init__()
        self.stem = make_stem(spec)
        self.layers = nn.ModuleList(Layer(spec.width, spec.heads, spec.mlp_ratio) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width)


class ProjectionHead(nn.Module):
    """(batch, width) -> (batch, output)."""

    def __init__(self, width: int, spec: Projection) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, spec.hidden)
        self.out = nn.Linear(spec.hidden, spec.output)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.gelu(self.hidden(x)))


class MultimodalModel(nn.Module):
    """Encoders, projection heads and, for a supervised objective, a linear head on the concatenated projections."""

    def __init__(self, description: ModelDescription) -> None:
        super().__init__()
        self.description = description
        self.encoders = nn.ModuleDict({spec.modality: EncoderModule(spec) for spec in description.encoders})
        self.projections = nn.ModuleDict(
            {spec.modality: ProjectionHead(spec.width, description.projection) for spec in description.encoders}
        )
        if description.objective.kind == "supervised":
            joined = description.projection.output * len(description.encoders)
            self.head: nn.Linear | None = nn.Linear(joined, description.objective.classes)
        else:
            self.head = None

    def segments(self) -> dict[str, nn.Module]:
        """Segment name -> module, in exchange order."""
        found: dict[str, nn.Module] = {}
        for modality, encoder in self.encoders.items():
            found[stem(modality)] = encoder.stem
            found |= {layer(modality, index): block for index, block in enumerate(encoder.layers)}
            found[norm(modality)] = encoder.norm
            found[projection(modality)] = self.projections[modality]
        if self.head is not None:
            found[HEAD] = self.head
        return found

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Raw inputs of every modality -> projections (batch, output)."""
        embeddings = {}
        for modality, encoder in self.encoders.items():
            x = encoder.stem(inputs[modality])
            for block in encoder.layers:
                x = block(x)
            embeddings[modality] = self.projections[modality](encoder.norm(x).mean(dim=1))
        return embeddings

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Raw inputs in the order of the description's encoders -> (logits,) or the two normalised embeddings."""
        embeddings = self.embed(dict(zip(self.encoders, inputs, strict=True)))
        if self.head is not None:
            return (self.head(torch.cat(list(embeddings.values()), dim=-1)),)
        return tuple(l2_normalise(z) for z in embeddings.values())


def build_model(description: ModelDescription, seed: int) -> MultimodalModel:
    """A model with random weights; the same description and seed give the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MultimodalModel(description)


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


def l2_normalise(z: Tensor) -> Tensor:
    """Unit rows; the epsilon keeps the gradient finite at zero."""
    return z * torch.rsqrt((z * z).sum(-1, keepdim=True) + 1e-6)
