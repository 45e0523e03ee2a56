"""timm and transformers beside a torch for the CPU.

Both import torchvision where it is installed (timm must, transformers may). Its wheel on the package index holds CUDA code:
beside a CPU build of torch its native library does not load, and the import fails on two operators that nobody registered.
Declaring them is enough; none is called.
"""

from types import ModuleType

import pytest
import torch

_KEPT: list[torch.library.Library] = []  # a library that is collected takes its operators along
_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_timm() -> ModuleType:
    """timm, or a skipped test where it is not installed."""
    _declare_operators()
    return pytest.importorskip("timm")


def import_transformers() -> ModuleType:
    """transformers, or a skipped test where it is not installed."""
    _declare_operators()
    return pytest.importorskip("transformers")


def _declare_operators() -> None:
    if _KEPT:
        return
    for operator in ("nms", "qnms"):
        if not torch._C._dispatch_has_kernel(f"torchvision::{operator}"):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{operator}{_BOXES}")
            _KEPT.append(library)
