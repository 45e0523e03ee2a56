"""Convolutions and their gradients in operations that every engine has: slices, matrix products, sums.

A convolution is a sum over kernel positions: shift the input, multiply its channels by the matrix at that position. So are
both of its gradients.

    convolution_backward    gradients: of the input as one more convolution, of the weight as a product for each position,
                            so that no more than one shifted copy of the input need live at once
    convolution             for an engine that has none for weights that are inputs: one product with all shifted copies
                            side by side, which is quick to compile and to run, and holds kernel-size times the input
    max_pool_backward       the gradient goes to the pixel that the forward pass recorded

One size axis or more: x (batch, channels, *sizes), weight (out, channels / groups, *kernel). Inside, channels are last.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

Sizes = Sequence[int]


@dataclass(frozen=True)
class Windows:
    """How a kernel slides over an image; each field has one number for each size axis."""

    sizes: Sizes  # of the image
    out: Sizes  # how many places the kernel takes
    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes

    @property
    def positions(self) -> list[tuple[int, ...]]:
        """Those in the kernel."""
        return _positions(self.kernel)

    @property
    def starts(self) -> list[Sizes]:
        """Where the pixels under each position begin in the padded image; they go on by `stride`."""
        return [[k * d for k, d in zip(position, self.dilation, strict=True)] for position in self.positions]

    def places(self, phase: Sizes, position: Sizes) -> Sizes | None:
        """The kernel's place when this position lies over the image's pixel `phase`; None if it never does.

        The pixel `phase + n * stride` lies under it at the place plus n.
        """
        distance = [a + p - k * d for a, p, k, d in zip(phase, self.padding, position, self.dilation, strict=True)]
        if any(value % s for value, s in zip(distance, self.stride, strict=True)):
            return None
        return [value // s for value, s in zip(distance, self.stride, strict=True)]

    @property
    def per_phase(self) -> Sizes:
        """How many pixels of the image have one remainder by the stride, rounded up."""
        return [-(-size // s) for size, s in zip(self.sizes, self.stride, strict=True)]


def convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sizes | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    transposed: bool,
    output_padding: Sizes,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias, None where `output_mask` is False.

    A transposed convolution is the input gradient of a plain one with the same weight, so the two change places.
    """
    of_bias = gradient.sum([0, *range(2, gradient.ndim)]) if output_mask[2] else None
    if transposed:
        windows = Windows(gradient.shape[2:], x.shape[2:], weight.shape[2:], stride, padding, dilation)
        zeros = [0 for _ in stride]
        plain = (gradient, weight, None, stride, padding, dilation, False, zeros, groups)
        return (
            torch.ops.aten.convolution(*plain) if output_mask[0] else None,
            _weight_gradient(x, gradient, groups, windows) if output_mask[1] else None,
            of_bias,
        )
    windows = Windows(x.shape[2:], gradient.shape[2:], weight.shape[2:], stride, padding, dilation)
    return (
        _input_gradient(gradient, weight, groups, windows) if output_mask[0] else None,
        _weight_gradient(gradient, x, groups, windows) if output_mask[1] else None,
        of_bias,
    )


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    transposed: bool,
    output_padding: Sizes,
    groups: int,
) -> Tensor:
    """What aten.convolution gives. Transposed, `weight` is (channels, out / groups, *kernel)."""
    kernel, sizes = weight.shape[2:], x.shape[2:]
    axes = list(zip(sizes, kernel, stride, padding, dilation, output_padding, strict=True))
    if transposed:
        larger = [(size - 1) * s - 2 * p + d * (k - 1) + 1 + extra for size, k, s, p, d, extra in axes]
        y = _transposed(x, _turned(weight, groups), groups, Windows(larger, sizes, kernel, stride, padding, dilation))
    else:
        out = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d, _ in axes]
        y = _forward(x, weight, groups, Windows(sizes, out, kernel, stride, padding, dilation))
    return _channels_first(y if bias is None else y + bias)


def max_pool_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Gradient of a two-dimensional max pool; `indices` are positions row * width + column in x."""
    stride = stride or kernel
    windows = Windows(x.shape[2:], gradient.shape[2:], *(_pair(value) for value in (kernel, stride, padding, dilation)))
    before, after = _reach(windows)
    gradient, indices = (_padded(_channels_last(value), before, after, fill) for value, fill in ((gradient, 0), (indices, -1)))

    def total(phase: Sizes, positions: list[Sizes], starts: list[Sizes]) -> Tensor:
        rows, columns = (
            torch.arange(count, device=x.device) * s + a
            for count, s, a in zip(windows.per_phase, windows.stride, phase, strict=True)
        )
        own = (rows.unsqueeze(1) * windows.sizes[1] + columns).unsqueeze(-1)
        shifted = (_shifted(value, starts, (1, 1), windows.per_phase) for value in (gradient, indices))
        return _sum(part * (at == own).to(part.dtype) for part, at in zip(*shifted, strict=True))

    return _channels_first(_by_phase(windows, before, total))


def _forward(x: Tensor, weight: Tensor, groups: int, windows: Windows) -> Tensor:
    x = _padded(_channels_last(x), windows.padding, windows.padding)
    return _products(x, weight, groups, windows.positions, windows.starts, windows.stride, windows.out)


def _input_gradient(gradient: Tensor, weight: Tensor, groups: int, windows: Windows) -> Tensor:
    """As aten.convolution: for stride 1 a plain one, which runtimes do faster than a transposed one."""
    axes = list(zip(windows.sizes, windows.out, windows.kernel, windows.stride, windows.padding, windows.dilation, strict=True))
    zeros, ones = [0 for _ in axes], [1 for _ in axes]
    around = [d * (k - 1) - p for _, _, k, _, p, d in axes]
    if all(s == 1 for s in windows.stride) and min(around) >= 0:
        flipped = _turned(weight, groups).flip(list(range(2, weight.ndim)))
        return torch.ops.aten.convolution(gradient, flipped, None, ones, around, windows.dilation, False, zeros, groups)
    beyond = [size - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, k, s, p, d in axes]  # no place reached them
    return torch.ops.aten.convolution(
        gradient, weight, None, windows.stride, windows.padding, windows.dilation, True, beyond, groups
    )


def _transposed(x: Tensor, weight: Tensor, groups: int, windows: Windows) -> Tensor:
    """Pixels with one remainder by the stride lie under the same kernel positions, so each remainder is a convolution of
    stride 1, and nothing is multiplied with zeros between pixels. `weight` is (out, channels / groups, *kernel)."""
    before, after = _reach(windows)
    x = _padded(_channels_last(x), before, after)
    ones = [1 for _ in windows.kernel]

    def total(phase: Sizes, positions: list[Sizes], starts: list[Sizes]) -> Tensor:
        return _products(x, weight, groups, positions, starts, ones, windows.per_phase)

    return _by_phase(windows, before, total)


def _weight_gradient(gradient: Tensor, x: Tensor, groups: int, windows: Windows) -> Tensor:
    """(out, channels / groups, *kernel): for each position the product of the gradient with the pixels under it."""
    channels, out = x.shape[1], gradient.shape[1]
    x = _padded(_channels_last(x), windows.padding, windows.padding)
    gradient = _channels_last(gradient).reshape(-1, out)
    is_depthwise = groups == channels == out
    if is_depthwise:
        ones = torch.ones_like(gradient[:, :1]).t()  # a product with it is a sum, which runtimes do much slower
    else:
        gradient = gradient.reshape(-1, groups, out // groups).permute(1, 2, 0)
    parts = []
    for pixels in _shifted(x, windows.starts, windows.stride, windows.out):
        if is_depthwise:
            part = ones @ (gradient * pixels.reshape(-1, channels))
        elif groups == 1:
            part = gradient[0] @ pixels.reshape(-1, channels)
        else:
            part = gradient @ pixels.reshape(-1, groups, channels // groups).transpose(0, 1)
        parts.append(part.reshape(out, channels // groups))
    return torch.stack(parts, -1).reshape(out, channels // groups, *windows.kernel)


def _products(
    x: Tensor, weight: Tensor, groups: int, positions: list[Sizes], starts: list[Sizes], stride: Sizes, count: Sizes
) -> Tensor:
    """(batch, *count, out): the sum over kernel positions of the shifted x times the weight there."""
    out, per_group = weight.shape[:2]
    matrices = [weight[(..., *position)] for position in positions]
    shifted = _shifted(x, starts, stride, count)
    if groups == 1:
        # the products' sum is one product of all side by side
        return torch.cat(list(shifted), -1) @ torch.cat(matrices, 1).t()
    if per_group == 1 and out == groups:
        return _sum(pixels * matrix[:, 0] for pixels, matrix in zip(shifted, matrices, strict=True))
    return _sum(_by_group(pixels, matrix, groups) for pixels, matrix in zip(shifted, matrices, strict=True))


def _by_group(pixels: Tensor, matrix: Tensor, groups: int) -> Tensor:
    """(batch, *count, channels) by (out, channels / groups) -> (batch, *count, out)."""
    out, per_group = matrix.shape
    rows = pixels.reshape(-1, groups, per_group).transpose(0, 1)
    products = rows @ matrix.reshape(groups, out // groups, per_group).transpose(1, 2)
    return products.transpose(0, 1).reshape(*pixels.shape[:-1], out)


def _by_phase(windows: Windows, before: Sizes, total: Callable[[Sizes, list[Sizes], list[Sizes]], Tensor]) -> Tensor:
    """(batch, *sizes, channels): `total(phase, positions, starts)` for the pixels of each remainder by the stride.

    `positions` are those that ever lie over them, `starts` the places of these, counted from `before` the first.
    """
    totals: list[Tensor | None] = []
    for phase in _positions(windows.stride):
        places = [(position, windows.places(phase, position)) for position in windows.positions]
        over = [(position, [a + b for a, b in zip(at, before, strict=True)]) for position, at in places if at is not None]
        totals.append(total(phase, [position for position, _ in over], [start for _, start in over]) if over else None)
    some = next(value for value in totals if value is not None)
    if len(totals) == 1:
        return some
    # A stride wider than the kernel leaves pixels that no place reached.
    stacked = torch.stack([torch.zeros_like(some) if value is None else value for value in totals], -2)
    axes, channels = len(windows.stride), some.shape[-1]
    apart = stacked.reshape(-1, *windows.per_phase, *windows.stride, channels)
    order = [axis for place in range(1, 1 + axes) for axis in (place, place + axes)]
    whole = [count * s for count, s in zip(windows.per_phase, windows.stride, strict=True)]
    joined = apart.permute(0, *order, 1 + 2 * axes).reshape(-1, *whole, channels)
    for axis, size in enumerate(windows.sizes, start=1):
        joined = _slice(joined, axis, 0, 1, size)
    return joined


def _reach(windows: Windows) -> tuple[list[int], list[int]]:
    """How far before the first and after the last place the pixels of the image look for one, for each axis."""
    before, after = [0 for _ in windows.stride], [0 for _ in windows.stride]
    for phase, position in product(_positions(windows.stride), windows.positions):
        for axis, place in enumerate(windows.places(phase, position) or ()):
            before[axis] = max(before[axis], -place)
            after[axis] = max(after[axis], place + windows.per_phase[axis] - windows.out[axis])
    return before, after


def _shifted(x: Tensor, starts: list[Sizes], stride: Sizes, count: Sizes) -> Iterator[Tensor]:
    """`count` pixels of (batch, *sizes, channels) from each start on; rows that follow each other are cut out once."""
    rows, cut_at = x, -1
    for first, *others in starts:
        if first != cut_at:
            rows, cut_at = _slice(x, 1, first, stride[0], count[0]), first
        pixels = rows
        for axis, start in enumerate(others, start=1):
            pixels = _slice(pixels, 1 + axis, start, stride[axis], count[axis])
        yield pixels


def _slice(x: Tensor, axis: int, start: int, step: int, count: int) -> Tensor:
    if (start, step, count) == (0, 1, x.shape[axis]):
        return x
    return torch.ops.aten.slice(x, axis, start, start + step * (count - 1) + 1, step)


def _padded(x: Tensor, before: Sizes, after: Sizes, fill: int = 0) -> Tensor:
    """(batch, *sizes, channels) with pixels before and after each size axis."""
    if not any(before) and not any(after):
        return x
    widths = [width for pair in zip(reversed(before), reversed(after), strict=True) for width in pair]
    return pad(x, [0, 0, *widths], value=fill)


def _sum(terms: Iterator[Tensor]) -> Tensor:
    """From left to right, so that a term is gone before the next one is made."""
    total = next(terms)
    for term in terms:
        total = total + term
    return total


def _turned(weight: Tensor, groups: int) -> Tensor:
    """(channels, out / groups, *kernel) of a transposed convolution -> (out, channels / groups, *kernel), and back."""
    many, per_group, *kernel = weight.shape
    apart = weight.reshape(groups, many // groups, per_group, *kernel).transpose(1, 2)
    return apart.reshape(groups * per_group, many // groups, *kernel)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, *range(2, x.ndim), 1)


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, x.ndim - 1, *range(1, x.ndim - 1))


def _positions(sizes: Sizes) -> list[tuple[int, ...]]:
    return list(product(*(range(size) for size in sizes)))


def _pair(value: Sizes) -> Sizes:
    return (value[0], value[0]) if len(value) == 1 else value
