"""Federated Layer-wise Learning and Federated Depth Dropout (arXiv 2309.05213): equal layers of ViT-Tiny, heads not counted.

The first layer stands for itself alone: what the paper calls layer 1 also has the embeddings, which its percentages leave out.
"""

from typing import Literal

import torch
from torch import nn

from benchmarks.published.model import META
from export.cost.estimate import cost_report
from export.models.models import Layer
from lamina.figures.cost_report import Accounting, CostReport
from lamina.plans.plan import Stage

LAYERS, TOKENS, WIDTH, HEADS, MLP_RATIO = 12, 65, 192, 3, 4


def report(frozen_weights: Literal["resident", "downloaded"], layer_budget: int | None = None) -> CostReport:
    """One stage for each phase, one round each."""
    with META:
        segments: dict[str, nn.Module] = {f"image.layers.{i}": Layer(WIDTH, HEADS, MLP_RATIO) for i in range(LAYERS)}
    names = list(segments)
    stages = [
        Stage(index=i, active=(name,), frozen=tuple(names[:i]), rounds=1, learning_rate=1.0) for i, name in enumerate(names)
    ]
    return cost_report(
        segments,
        dict.fromkeys(names, (torch.zeros(1, TOKENS, WIDTH, device=META),)),
        stages,
        name="depth_dropout",
        accounting=Accounting(frozen_weights=frozen_weights, layer_budget=layer_budget, file_headers=False),
    )
