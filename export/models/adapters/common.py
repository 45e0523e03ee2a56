"""What all adapters share: the working copy of the user's model, the check of a trunk against it, and small pools."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from export.models.copies import copied
from export.ops.rewrites import untie
from export.trunk import FirstToken, Trunk
from lamina.errors import ConfigError, CutError

_TOLERANCE = 1e-4  # relative: far above rounding, far below any other computation
_POOLS = ("first", "mean")


def working_copy(module: nn.Module) -> Any:
    """A copy in evaluation mode whose attention is written in plain matrix products; the given module stays as it is."""
    _check_weights(module)
    copy = copied(module).eval()
    for part in copy.modules():
        config = getattr(part, "config", None)
        if hasattr(config, "_attn_implementation"):  # transformers
            config._attn_implementation = "eager"
        if hasattr(part, "fused_attn"):  # timm
            part.fused_attn = False
        if hasattr(part, "gradient_checkpointing"):
            part.gradient_checkpointing = False
    return copy


def check_trunk(trunk: Trunk, example: Tensor, expected: Tensor, name: str) -> Trunk:
    """The trunk, if it gives what the library's own forward pass gave for the example: (batch, width).

    Raises CutError if it does not, or if a segment has a buffer.
    """
    for segment in segments_of(trunk):
        for key, _ in segment.named_buffers():
            raise CutError(f"{name}: buffer {key!r} is neither trained nor sent, and this adapter cannot do without it")
    with torch.no_grad():
        found = run_trunk(trunk, example)
    error = (
        float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        if found.shape == expected.shape
        else float("inf")
    )
    if not error <= _TOLERANCE:
        raise CutError(
            f"{name}: the adapter's trunk differs from the library's forward pass by {error:.2g} of the largest value; the "
            "class or this version of the library computes something else. Give the model `stem`, `layers` and `input` of "
            "its own (see docs/export.md)"
        )
    return trunk


def run_trunk(trunk: Trunk, x: Tensor) -> Tensor:
    """Raw input -> (batch, width)."""
    for segment in segments_of(trunk):
        x = segment(x)
    return trunk.pool(x)


def segments_of(trunk: Trunk) -> tuple[nn.Module, ...]:
    """Stem, layers and norm, in order."""
    return (trunk.stem, *trunk.layers, trunk.norm)


def release_shared(trunk: Trunk) -> Trunk:
    """The trunk, or one with copies of its segments if they share a parameter; notes name them."""
    layers = {f"layer {index}": layer for index, layer in enumerate(trunk.layers)}
    own = {} if trunk.projection is None else {"projection": trunk.projection}
    copies, shared = untie({"stem": trunk.stem, **layers, "norm": trunk.norm, **own})
    if not shared:
        return trunk
    return replace(
        trunk,
        stem=copies["stem"],
        layers=tuple(copies[name] for name in layers),
        norm=copies["norm"],
        projection=copies.get("projection"),
        notes=(*trunk.notes, *(f"{found.where}: {found.note}." for found in shared)),
    )


def left_out(module: nn.Module, kept: nn.Module) -> tuple[str, ...]:
    """A note for each part of a library's model beside the encoder that is kept: heads, decoders."""
    if module is kept:
        return ()
    names = [name for name, child in module.named_children() if child is not kept and any(True for _ in child.parameters())]
    return (f"Left out: {', '.join(names)}.",) if names else ()


def check_pool(pool: str, name: str) -> None:
    if pool not in _POOLS:
        raise ConfigError(f"{name}: pool={pool!r} is not known; say 'first' or 'mean'")


class MeanOf(nn.Module):
    """(batch, tokens, width) -> (batch, width): the mean over tokens `start` to `stop`, which is left out."""

    def __init__(self, start: int, stop: int | None = None) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.start : self.stop].mean(dim=1)


class Unmasked(nn.Module):
    """A library's layer that wants a mask, without one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, None)


def image_pool(pool: str, special_tokens: int) -> nn.Module:
    """The first token, or the mean over what follows the class token and the other special tokens."""
    return FirstToken() if pool == "first" else MeanOf(special_tokens)


def _check_weights(module: nn.Module) -> None:
    """The model is run once, so what `export.graphs.cut` refuses of its weights is refused here already."""
    for key, value in _tensors(module):
        if value.device.type != "cpu":
            raise CutError(f"{key!r} is on {value.device}; export reads weights on the CPU: call model.cpu()")
        if value.is_floating_point() and value.dtype != torch.float32:
            raise CutError(f"{key!r} is {value.dtype}; programs train float32: call model.float()")


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
