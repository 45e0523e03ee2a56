"""LW-FedSSL with MoCoV3 (arXiv 2401.11647 v4): ViT-Tiny on 32 pixels in patches of 4, one layer a stage, 15 rounds each.

One view of the online branch is counted, as in the paper; the projection and the prediction head are one head here.
"""

from torch import nn

from benchmarks.published.model import META, PublishedModel, mlp_head, vit_tiny
from lamina.figures.cost_report import CostReport
from lamina.plans.plan import StrategyName

ROUNDS = (15,) * 12
LOCAL_EPOCHS = 3


def make_model() -> PublishedModel:
    """On the `meta` device."""
    with META:
        head = nn.Sequential(mlp_head((192, 512, 512, 256)), mlp_head((256, 512, 256)))
    return PublishedModel(name="lw_fedssl", encoders=(vit_tiny("image", head, image=32, patch=4, has_pooler=False),))


def report(strategy: StrategyName) -> CostReport:
    return make_model().report(strategy, ROUNDS, {"image": 1}, LOCAL_EPOCHS)
