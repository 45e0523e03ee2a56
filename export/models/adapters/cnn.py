"""Convolutional networks: ResNet of timm and torchvision, EfficientNet and MobileNetV3 of timm.

The stem is everything before the first block, with its max pool; each block is a layer, so widths and image sizes change from
layer to layer; the pool is the mean over pixels, filled up to the greatest width. Batch norms are folded
(`export.ops.rewrites`), because a segment has no buffers.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from export.models.adapters.common import check_trunk, working_copy
from export.ops.rewrites import fold_batch_norm
from export.trunk import Trunk
from lamina.errors import ConfigError, CutError
from lamina.plans.model import Image

_DEFAULT_SIZE = 224
_RESNETS = (("timm.models.resnet", "ResNet"), ("torchvision.models.resnet", "ResNet"))
_EFFICIENT = (("timm.models.efficientnet", "EfficientNet"), ("timm.models.mobilenetv3", "MobileNetV3"))
NETWORKS = (*_RESNETS, *_EFFICIENT)
"""(start of the module's name, class) of what `adapt_cnn` takes."""


class MeanPixels(nn.Module):
    """(batch, channels, height, width) -> (batch, width): the mean over pixels, and zeros for channels that are not there.

    Early blocks have fewer channels, and the heads, which all stages share, take one width.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def extra_repr(self) -> str:
        return f"width={self.width}"

    def forward(self, x: Tensor) -> Tensor:
        y = x.mean(dim=(2, 3))
        return nn.functional.pad(y, (0, self.width - y.shape[1])) if y.shape[1] < self.width else y


def adapt_cnn(module: nn.Module, *, size: int | None = None) -> Trunk:
    """The trunk for square images of `size` pixels; by default timm's size for the model, or 224.

    The classifier is left out; so is MobileNetV3's last convolution, which comes after the pool.
    """
    is_resnet = _is_a(module, _RESNETS)
    name = f"{type(module).__module__.split('.')[0]} {type(module).__name__}"
    copy, rewrites = fold_batch_norm(working_copy(module), name)
    size = _image_size(module) if size is None else size
    if size < 1:
        raise ConfigError(f"{name}: size={size} must be 1 or more pixels")
    channels = next(part.in_channels for part in copy.modules() if isinstance(part, nn.Conv2d))
    example = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            expected = _pooled_features(copy, example)
        except RuntimeError as error:
            raise CutError(f"{name} cannot take images of {size}x{size} pixels: {error}; give another size=...") from error
    stem, layers = _resnet_parts(copy) if is_resnet else _efficient_parts(copy)
    pool = MeanPixels(_greatest_width(stem, layers, example))
    expected = nn.functional.pad(expected, (0, pool.width - expected.shape[1]))
    trunk = Trunk(
        stem=stem,
        layers=tuple(layers),
        norm=nn.Identity(),
        pool=pool,
        input=Image(channels=channels, height=size, width=size),
        notes=_left_out(module),
        rewrites=tuple(rewrites),
    )
    return check_trunk(trunk, example, expected, name)


@torch.no_grad()
def _greatest_width(stem: nn.Module, layers: list[nn.Module], x: Tensor) -> int:
    """Channels after a block, the most of all blocks."""
    x, width = stem(x), 0
    for layer in layers:
        x = layer(x)
        width = max(width, x.shape[1])
    return width


def _resnet_parts(model: Any) -> tuple[nn.Module, list[nn.Module]]:
    names = ("conv1", "bn1", "act1", "relu", "maxpool")  # timm says act1, torchvision relu
    stem = nn.Sequential(OrderedDict((name, getattr(model, name)) for name in names if hasattr(model, name)))
    return stem, [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]


def _efficient_parts(model: Any) -> tuple[nn.Module, list[nn.Module]]:
    stem = nn.Sequential(OrderedDict(conv_stem=model.conv_stem, bn1=model.bn1))
    layers = [block for stage in model.blocks for block in stage]
    if hasattr(model, "bn2") and isinstance(model.conv_head, nn.Conv2d):  # EfficientNet's, before the pool
        layers.append(nn.Sequential(OrderedDict(conv_head=model.conv_head, bn2=model.bn2)))
    return stem, layers


def _pooled_features(model: Any, x: Tensor) -> Tensor:
    """(batch, width), by the library's own forward pass."""
    if hasattr(model, "forward_features"):
        return model.forward_features(x).mean((2, 3))
    model.fc = nn.Identity()
    return model(x)


def _image_size(module: Any) -> int:
    shape = (getattr(module, "pretrained_cfg", None) or {}).get("input_size") or (0, 0, _DEFAULT_SIZE)
    return shape[-1]


def _left_out(module: nn.Module) -> tuple[str, ...]:
    names = ["fc", "classifier", *(["conv_head"] if type(module).__name__ == "MobileNetV3" else [])]
    dropped = [name for name in names if any(True for _ in getattr(module, name, nn.Identity()).parameters())]
    return (f"Left out: {', '.join(dropped)}.",) if dropped else ()


def _is_a(module: nn.Module, kinds: tuple[tuple[str, str], ...]) -> bool:
    return any((cls.__module__, cls.__name__) in kinds for cls in type(module).__mro__)
