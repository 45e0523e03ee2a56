"""LW-FedMML on COCO (arXiv 2407.15426): ViT-Tiny/16 at 224 pixels, DistilBERT-base with 40 tokens, contrastive."""

from benchmarks.published.model import META, PublishedModel, distilbert, mlp_head, vit_tiny
from lamina.figures.cost_report import CostReport
from lamina.plans.plan import StrategyName

LAYERS_PER_STAGE = {"image": 2, "text": 1}
SKEWED = (0, 0, 0, 10, 30, 50)
UNIFORM = (15,) * 6
LOCAL_EPOCHS = 3


def make_model(text_tokens: int = 40) -> PublishedModel:
    """On the `meta` device; 111 M parameters, the ViT's unused pooler among them."""
    with META:
        image_head = mlp_head((192, 4096, 4096, 256), dropout=0.1)
        text_head = mlp_head((768, 4096, 4096, 256), dropout=0.1)
    return PublishedModel(
        name="lw_fedmml_coco",
        encoders=(
            vit_tiny("image", image_head, image=224, patch=16, has_pooler=True),
            distilbert("text", text_head, tokens=text_tokens),
        ),
    )


def report(strategy: StrategyName, rounds: tuple[int, ...], text_tokens: int = 40) -> CostReport:
    return make_model(text_tokens).report(strategy, rounds, LAYERS_PER_STAGE, LOCAL_EPOCHS)
