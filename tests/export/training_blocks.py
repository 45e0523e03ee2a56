"""A small module around a block, as a stage has it, and its training program on an engine."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from export.graphs.joint import joint_graph
from export.graphs.trace import forward_graph
from export.lowering.parity import check_parity
from export.lowering.runtimes import is_installed
from export.lowering.worker import lower
from export.ops.rewrites import plain_operations

CLASSES, MAX_BATCH = 3, 4
ENGINES = [
    pytest.param(engine, marks=pytest.mark.skipif(not is_installed(engine), reason=f"{engine} is not installed"))
    for engine in ("onnxruntime", "executorch")
]


class Trained(nn.Module):
    """(x, labels) -> (loss, correct). The block's input depends on a weight, so that its own gradient is needed too."""

    def __init__(self, block, example):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.block = block
        self.head = nn.Linear(self._pooled(block(example)).shape[1], CLASSES)

    def forward(self, x, labels):
        logits = self.head(self._pooled(self.block(x * self.scale)))
        return F.cross_entropy(logits, labels), (logits.argmax(-1) == labels).sum()

    @staticmethod
    def _pooled(x):  # tokens (batch, tokens, width), or pixels (batch, channels, height, width)
        return x.mean(1) if x.ndim == 3 else x.flatten(2).mean(-1)


def joint_of(block, *shape):
    """The joint graph of a block in evaluation mode, its module and its example inputs."""
    torch.manual_seed(0)
    module = Trained(block.eval(), torch.randn(2, *shape)).eval()
    example = (torch.randn(2, *shape), torch.randint(CLASSES, (2,)))
    with plain_operations():
        forward = forward_graph(module, example, MAX_BATCH)
        names = [name for name, _ in module.named_parameters()]
        return joint_graph(forward, names), module, example


def check_trains(engine, block, *shape):
    """Loss and every gradient of the program are those of eager PyTorch, with one sample and with two."""
    joint, module, example = joint_of(block, *shape)
    check_parity(lower(engine, joint).data, engine, "train", "the block", module, example)
