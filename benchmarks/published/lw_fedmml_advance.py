"""LW-FedMML on ADVANCE (arXiv 2407.15426): ViT-Tiny/16 at 224 pixels, a distilled AST of 6 layers, 13 classes."""

import torch
from torch import nn

from benchmarks.published.lw_fedmml_coco import LAYERS_PER_STAGE, LOCAL_EPOCHS
from benchmarks.published.model import META, PublishedModel, distilled_ast, mlp_head, vit_tiny
from lamina.figures.cost_report import CostReport
from lamina.plans.plan import StrategyName


def make_model() -> PublishedModel:
    """On the `meta` device."""
    with META:
        image_head = mlp_head((192, 4096, 4096, 256), dropout=0.1)
        audio_head = mlp_head((768, 4096, 4096, 256), dropout=0.1)
        task_head = nn.Sequential(nn.Linear(512, 256), nn.Dropout(0.1), nn.ReLU(), nn.Linear(256, 13))
    return PublishedModel(
        name="lw_fedmml_advance",
        encoders=(
            vit_tiny("image", image_head, image=224, patch=16, has_pooler=True),
            distilled_ast("audio", audio_head),
        ),
        head=(task_head, torch.zeros(1, 512, device=META)),
    )


def report(strategy: StrategyName, rounds: tuple[int, ...]) -> CostReport:
    layers = {"image": LAYERS_PER_STAGE["image"], "audio": LAYERS_PER_STAGE["text"]}
    return make_model().report(strategy, rounds, layers, LOCAL_EPOCHS)
