"""A published model as segments, and the parts that the published models share.

Built on the `meta` device: every shape is there, no weight takes memory, nothing is downloaded or computed. The transformers
are those of Hugging Face `transformers` 5, from their configurations alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cpu_torchvision import make_torchvision_importable
from export.cost.estimate import cost_report
from lamina.figures.cost_report import Accounting, CostReport
from lamina.plans.model import Contrastive, Image, ModelDescription, ModuleEncoder, Projection, Supervised, TextTokens, Values
from lamina.plans.plan import StrategyName
from lamina.plans.segments import HEAD
from lamina.plans.strategies import make_stages

META = torch.device("meta")


@dataclass(frozen=True)
class PublishedEncoder:
    """One modality: its segments with one example each, in order; parts that the model stores and never uses; its words."""

    segments: Mapping[str, nn.Module]
    examples: Mapping[str, tuple[Tensor, ...]]
    unused: Sequence[nn.Module]
    spec: ModuleEncoder


@dataclass(frozen=True)
class PublishedModel:
    """Encoders and, for a supervised objective, the task head with its example."""

    name: str
    encoders: Sequence[PublishedEncoder]
    head: tuple[nn.Module, Tensor] | None = None

    def report(
        self, strategy: StrategyName, rounds: int | Sequence[int], layers_per_stage: Mapping[str, int], local_epochs: int
    ) -> CostReport:
        """What a strategy costs, by the papers' accounting: values alone, float32, frozen weights on the device."""
        segments: dict[str, nn.Module] = {}
        examples: dict[str, tuple[Tensor, ...]] = {}
        for encoder in self.encoders:
            segments |= encoder.segments
            examples |= encoder.examples
        if self.head is not None:
            segments[HEAD], examples[HEAD] = self.head[0], (self.head[1],)
        description = ModelDescription(
            name=self.name,
            encoders=tuple(encoder.spec for encoder in self.encoders),
            projection=Projection(hidden=None, output=1),  # the published heads are other modules; a schedule needs names alone
            objective=Supervised(classes=2) if self.head is not None or len(self.encoders) == 1 else Contrastive(),
        )
        stages = make_stages(description, strategy, rounds, 1.0, layers_per_stage)
        if HEAD not in segments:
            stages = tuple(s.model_copy(update={"active": tuple(n for n in s.active if n != HEAD)}) for s in stages)
        return cost_report(
            segments,
            examples,
            stages,
            name=self.name,
            strategy=strategy,
            unused=[part for encoder in self.encoders for part in encoder.unused],
            accounting=Accounting(file_headers=False),
            local_epochs=local_epochs,
        )


def mlp_head(widths: Sequence[int], *, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers without bias, each but the last followed by (dropout,) batch norm and ReLU; the last by a batch norm
    without affine parameters."""
    parts: list[nn.Module] = []
    for index, (wide, narrow) in enumerate(pairwise(widths)):
        is_last = index == len(widths) - 2
        parts.append(nn.Linear(wide, narrow, bias=False))
        parts += [nn.Dropout(dropout)] if dropout and not is_last else []
        parts += [nn.BatchNorm1d(narrow, affine=False)] if is_last else [nn.BatchNorm1d(narrow), nn.ReLU()]
    return nn.Sequential(*parts)


def transformer_encoder(
    modality: str, stem: nn.Module, layers: Sequence[nn.Module], norm: nn.Module, head: nn.Module, **shape: Any
) -> PublishedEncoder:
    """`shape`: `example` of the raw input, `tokens`, `width`, and `unused` parts."""
    tokens, width, example = shape["tokens"], shape["width"], shape["example"]
    features = torch.zeros(1, tokens, width, device=META)
    names = [f"{modality}.layers.{index}" for index in range(len(layers))]
    raw = tuple(example.shape[1:])
    spec = ModuleEncoder(
        modality=modality,
        factory="benchmarks.published.model:transformer_encoder",
        input=TextTokens(vocabulary=1, length=raw[0])
        if example.dtype == torch.int64
        else (Image(channels=raw[0], height=raw[1], width=raw[2]) if len(raw) == 3 else Values(shape=raw)),
        features=((tokens, width),) * (len(layers) + 1),
        width=width,
    )
    return PublishedEncoder(
        segments={f"{modality}.stem": stem}
        | dict(zip(names, layers, strict=True))
        | {f"{modality}.norm": norm, f"{modality}.projection": head},
        examples={f"{modality}.stem": (example,)}
        | {name: (features,) for name in (*names, f"{modality}.norm")}
        | {f"{modality}.projection": (torch.zeros(1, width, device=META),)},
        unused=tuple(shape.get("unused", ())),
        spec=spec,
    )


def vit_tiny(modality: str, head: nn.Module, *, image: int, patch: int, has_pooler: bool) -> PublishedEncoder:
    """ViT-Tiny: width 192, 12 layers, 3 heads. The pooler, where the model has one, is stored and never used."""
    made = _transformer(
        "ViT",
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=image,
        patch_size=patch,
    )
    return transformer_encoder(
        modality,
        made.embeddings,
        list(made.layers),
        made.layernorm,
        head,
        example=torch.zeros(1, 3, image, image, device=META),
        tokens=(image // patch) ** 2 + 1,
        width=192,
        unused=[made.pooler] if has_pooler else [],
    )


def distilbert(modality: str, head: nn.Module, *, tokens: int) -> PublishedEncoder:
    """DistilBERT-base: width 768, 6 layers, 30,522 words, 512 positions; no final norm."""
    made = _transformer("DistilBert", vocab_size=30522, max_position_embeddings=512, dim=768, n_layers=6, n_heads=12)
    return transformer_encoder(
        modality,
        made.embeddings,
        list(made.transformer.layer),
        nn.Identity(),
        head,
        example=torch.zeros(1, tokens, dtype=torch.int64, device=META),
        tokens=tokens,
        width=768,
    )


def distilled_ast(modality: str, head: nn.Module) -> PublishedEncoder:
    """Audio spectrogram transformer with 6 layers of width 768, on 1,024 frames of 128 mel bands: 1,214 tokens."""
    made = _transformer("AST", hidden_size=768, num_hidden_layers=6, max_length=1024, num_mel_bins=128)
    return transformer_encoder(
        modality,
        made.embeddings,
        list(made.encoder.layer if hasattr(made, "encoder") else made.layers),
        made.layernorm,
        head,
        example=torch.zeros(1, 1024, 128, device=META),
        tokens=1214,
        width=768,
    )


def _transformer(family: str, **config: Any) -> Any:
    """A model of the `transformers` package with attention in plain matrix products."""
    make_torchvision_importable()
    import transformers

    settings = getattr(transformers, f"{family}Config")(attn_implementation="eager", **config)
    with META:
        return getattr(transformers, f"{family}Model")(settings)
