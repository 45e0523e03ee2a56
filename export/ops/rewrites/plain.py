"""Calls of torch that an engine cannot train, replaced by equal plain ones while a module runs or is traced.

A module keeps its code and its parameter names; what it calls is intercepted:

    scaled_dot_product_attention, and inside nn.MultiheadAttention    two matrix products and a softmax
    a convolution whose kernels lie side by side (patches)            a reshape and one matrix product
    an average pool whose windows lie side by side                    a reshape and a mean
    batch norm in evaluation mode                                     a scale and a shift
    dropout that is on                                                nothing
    weight_norm of torch.nn.utils.parametrizations                    a root of a sum of squares, and a product
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from math import prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from export.ops.rewrites.proof import Proofs
from lamina.bundles.manifest import Rewrite
from lamina.errors import CutError

_REMOVED = -1e9  # a score that the softmax turns into exactly 0; -inf would give NaN where a whole row is removed
_LEFT_OUT = "dropout that is on also in evaluation mode is left out"

Watch = Callable[[str, Sequence[str], Callable[[], Any], Any], None]
"""(kind, notes, the original call, what the replacement gave)"""


@contextmanager
def plain_operations(watch: Watch | None = None) -> Iterator[None]:
    """Inside, modules call plain operations. For modules in evaluation mode; `watch` is told of each replaced call.

    Raises CutError for attention with fewer key than query heads (`enable_gqa`).
    """
    had_fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator for a whole encoder layer
    try:
        with _PlainOperations(watch):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(had_fast_path)


def prove_rewrites(module: nn.Module, inputs: tuple[Tensor, ...], where: str = "") -> list[Rewrite]:
    """What `plain_operations` replaces in `module(*inputs)`, by kind, with the largest difference to the original.

    The module runs once, as a copy in evaluation mode. Raises ParityError that names `where` and the kind of a replacement
    that differs by more than 1e-5 (of the largest value, if that is above 1).
    """
    proofs = Proofs(where)
    copy = deepcopy(module).eval()
    with torch.no_grad(), plain_operations(proofs.add):
        copy(*inputs)
    return proofs.rewrites()


class _PlainOperations(TorchFunctionMode):
    def __init__(self, watch: Watch | None) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rewrite = _REWRITES.get(function)
        if rewrite is None:
            return function(*args, **kwargs)
        found = rewrite(function, *args, **kwargs)
        if found is None:
            return function(*args, **kwargs)
        kind, notes, original, result = found
        if self.watch is not None and kind:
            self.watch(kind, notes, original, result)
        return result


_Replaced = tuple[str, Sequence[str], Callable[[], Any], Any] | None
"""As `Watch`; None where the call stays as it is. A kind of "" is a change that needs no word."""


def _attention(
    function: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> _Replaced:
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        raise CutError(
            f"attention with {query.shape[-3]} query heads and {key.shape[-3]} key heads (enable_gqa) has no plain form here: "
            "repeat the key and value heads in forward(), with expand and reshape"
        )
    if is_causal and attn_mask is not None:
        return None  # torch has a message for this

    def original() -> Tensor:
        return function(query, key, value, attn_mask, 0.0, is_causal, scale=scale)

    scores = query @ key.transpose(-2, -1) * (1 / sqrt(query.shape[-1]) if scale is None else scale)
    mask = attn_mask
    if is_causal:
        mask = torch.arange(query.shape[-2], device=query.device).unsqueeze(1) >= torch.arange(
            key.shape[-2], device=query.device
        )
    if mask is None:
        weights = torch.softmax(scores, dim=-1)
    elif mask.dtype == torch.bool:
        weights = torch.softmax(torch.where(mask, scores, _REMOVED), dim=-1)
        if not is_causal:  # a row without any key gives zero; a causal one always has a key
            weights = weights * mask.to(scores.dtype)
    else:
        weights = torch.softmax(scores + mask, dim=-1)
    return "attention in plain products", [_LEFT_OUT] if dropout_p else [], original, weights @ value


def _multi_head_attention(function: Any, *args: Any, need_weights: bool = True, **kwargs: Any) -> _Replaced:
    """Torch's own code for "weights wanted" is plain. `need_weights` is always given by name (nn.MultiheadAttention does)."""
    if len(args) > _POSITION_OF_TRAINING:
        return None
    on = kwargs.pop("training", True) and args[_POSITION_OF_DROPOUT] > 0

    def call(wanted: bool, **changed: Any) -> Any:
        return function(*args, training=False, need_weights=wanted, **(kwargs | changed))

    if need_weights:
        result = call(True)
        return "attention in plain products" if on else "", [_LEFT_OUT], lambda: result, result
    result = (call(True, average_attn_weights=False)[0], None)  # the average would be one more operation
    return "attention in plain products", [_LEFT_OUT] if on else [], lambda: call(False), result


_POSITION_OF_DROPOUT, _POSITION_OF_TRAINING = 10, 13


def _patches(
    function: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Replaced:
    kernel = tuple(weight.shape[2:])
    axes = len(kernel)
    stride, dilation = _each(stride, axes), _each(dilation, axes)
    padding = (0,) * axes if padding == "valid" else padding
    is_patches = stride == kernel and groups == 1 and x.ndim == axes + 2 and prod(kernel) > 1
    if not is_patches or padding == "same" or any(_each(padding, axes)) or any(d != 1 for d in dilation):
        return None

    def original() -> Tensor:
        return function(x, weight, bias, stride, 0, 1, 1)

    apart, count = _apart(x, kernel)
    channels, out = x.shape[1], weight.shape[0]
    outer, inner = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    patches = apart.permute(0, *outer, 1, *inner).reshape(-1, prod(count), channels * prod(kernel))
    y = F.linear(patches, weight.reshape(out, -1), bias)
    return "patches as one product", [], original, y.transpose(1, 2).reshape(-1, out, *count)


def _average_pool(
    function: Any,
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> _Replaced:
    kernel = _each(kernel_size, 2)
    strides = kernel if stride is None or stride == [] else _each(stride, 2)
    is_uneven = any(size % k for size, k in zip(x.shape[2:], kernel, strict=False))
    if strides != kernel or any(_each(padding, 2)) or x.ndim != 4 or (ceil_mode and is_uneven) or divisor_override:
        return None
    y = _apart(x, kernel)[0].mean((3, 5))
    return "average pool as a mean", [], lambda: function(x, kernel, strides), y


def _apart(x: Tensor, kernel: Sequence[int]) -> tuple[Tensor, list[int]]:
    """(batch, channels, *sizes) -> (batch, channels, count, kernel, count, kernel, ...), counts; a short rest is left out."""
    count = [size // k for size, k in zip(x.shape[2:], kernel, strict=True)]
    for axis, (many, k) in enumerate(zip(count, kernel, strict=True), start=2):
        if x.shape[axis] != many * k:
            x = x.narrow(axis, 0, many * k)
    return x.reshape(-1, x.shape[1], *(size for pair in zip(count, kernel, strict=True) for size in pair)), count


def _batch_norm(
    function: Any,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> _Replaced:
    if training or running_mean is None or running_var is None:
        return None
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    y = x * scale.reshape(shape) + shift.reshape(shape)
    return (
        "batch norm as scale and shift",
        [],
        lambda: function(x, running_mean, running_var, weight, bias, False, 0.0, eps),
        y,
    )


def _weight_norm(function: Any, v: Tensor, g: Tensor, dim: int = 0) -> _Replaced:
    axes = [axis for axis in range(v.ndim) if dim == -1 or axis != dim % v.ndim]
    length = v.pow(2).sum(axes, keepdim=True).sqrt()
    return "weight norm in plain products", [], lambda: function(v, g, dim), v * (g / length)


def _dropout(function: Any, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> _Replaced:
    # Off, it is the identity already; on, its original here is dropout that is off, for chance has no parity.
    kind = "dropout left out" if training and p else ""
    return kind, [_LEFT_OUT] if kind else [], lambda: x, x


def _each(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


_REWRITES: dict[Any, Callable[..., _Replaced]] = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    F.conv1d: _patches,
    F.conv2d: _patches,
    F.avg_pool2d: _average_pool,
    F.batch_norm: _batch_norm,
    torch._weight_norm: _weight_norm,
    **{
        function: _dropout
        for function in (
            F.dropout,
            F.dropout1d,
            F.dropout2d,
            F.dropout3d,
            F.alpha_dropout,
            F.feature_alpha_dropout,
            torch.dropout,
            torch.alpha_dropout,
            torch.feature_dropout,
        )
    },
}
