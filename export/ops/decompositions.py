"""Backward formulas of our own, where torch's decomposition keeps more full-size temporaries alive than needed.

On a device the peak of live values is what decides whether a layer fits, so the order of operations counts: each value is
used up as soon as it exists, and at most two temporaries of the size of the input live at once.
"""

from collections.abc import Callable
from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from export.ops.convolutions import convolution_backward, max_pool_backward

_ATEN = torch.ops.aten
_MEAN = 1  # torch's number for reduction="mean"


def gelu_backward(gradient: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    """d gelu(x) / dx = cdf(x) + x pdf(x) for the exact GELU; the tanh form is left to torch."""
    if approximate != "none":
        return NotImplemented
    slope = (x * x * -0.5).exp() * (1 / sqrt(2 * pi)) * x
    return (slope + (torch.erf(x * sqrt(0.5)) * 0.5 + 0.5)) * gradient


def silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """s (1 + x (1 - s)) with s = sigmoid(x). The ONNX exporter claims to know torch's operator and fails on it."""
    slope = torch.sigmoid(x)
    return ((1 - slope) * x + 1) * slope * gradient


def mish_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """t + x s (1 - t t) with t = tanh(softplus(x)), s = sigmoid(x); for the same reason."""
    curve = torch.tanh(softplus(x))
    return ((1 - curve * curve) * torch.sigmoid(x) * x + curve) * gradient


def softmax_backward(gradient: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    """y * (g - sum(g * y)): the product g * y is gone before the difference is made."""
    return (gradient - (gradient * output).sum(dim, keepdim=True)) * output


def nll_loss_backward(
    gradient: Tensor,
    log_probabilities: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
) -> Tensor:
    """-gradient / number of targets at the target class, else 0.

    By comparison instead of torch's scatter, and without `total_weight`, which the ONNX exporter always writes as 1 (its
    gradients would be those of the sum instead of the mean).
    """
    if weight is not None or reduction != _MEAN or log_probabilities.ndim != 2:
        return NotImplemented
    counts = target != ignore_index
    classes = torch.arange(log_probabilities.shape[1], device=target.device)
    hit = (target.unsqueeze(1) == classes).logical_and(counts.unsqueeze(1))
    return hit.to(gradient.dtype) * (-gradient / counts.sum())


def constant_pad(x: Tensor, widths: list[int], value: float = 0) -> Tensor:
    """A negative width cuts off: the gradient of a pad is one. ExecuTorch refuses negative widths, so they are slices."""
    if all(width >= 0 for width in widths):
        return NotImplemented
    for place in range(0, len(widths), 2):
        axis = x.ndim - 1 - place // 2
        before, after = (max(0, -width) for width in widths[place : place + 2])
        x = x.narrow(axis, before, x.shape[axis] - before - after)
    kept = [max(0, width) for width in widths]
    return torch.ops.aten.constant_pad_nd(x, kept, value) if any(kept) else x


LEAN: dict[Any, Callable[..., Any]] = {
    _ATEN.gelu_backward.default: gelu_backward,
    _ATEN.silu_backward.default: silu_backward,
    _ATEN.mish_backward.default: mish_backward,
    _ATEN._softmax_backward_data.default: softmax_backward,
    _ATEN.nll_loss_backward.default: nll_loss_backward,
    _ATEN.constant_pad_nd.default: constant_pad,
    _ATEN.convolution_backward.default: convolution_backward,
    _ATEN.max_pool2d_with_indices_backward.default: max_pool_backward,
}
