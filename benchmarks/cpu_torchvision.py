"""timm and transformers beside a torch for the CPU, for benchmarks and tests.

Both import torchvision where it is installed (timm must, transformers may). Its wheel on the package index holds CUDA code:
beside a CPU build of torch its native library does not load, and the import fails on two operators that nobody registered.
Declaring them is enough; none is called.
"""

from importlib.util import find_spec

import torch

_KEPT: list[torch.library.Library] = []  # a library that is collected takes its operators along
_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def make_torchvision_importable() -> None:
    """Declares the operators that are missing; call it before the first import of timm or transformers."""
    if _KEPT or find_spec("torchvision") is None:
        return
    for operator in ("nms", "qnms"):
        if not torch._C._dispatch_has_kernel(f"torchvision::{operator}"):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{operator}{_BOXES}")
            _KEPT.append(library)
