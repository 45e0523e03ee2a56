"""A start from trained encoders: what a vendor would do with data of its own before the first device takes part.

The whole model is trained on public rows, end to end, in PyTorch. Stems and layers are kept. The final norms and the heads
start fresh, as in FedMML, which loads a pretrained ViT without its last norm (methods, section 1.1).
"""

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.methods.data_sets import Arrays
from export.models.models import MultimodalModel, build_model
from lamina.names import LABEL
from lamina.plans.model import ModelDescription

EPOCHS, BATCH, LEARNING_RATE = 30, 32, 1e-3


def pretrained_model(description: ModelDescription, public: Arrays, seed: int) -> MultimodalModel:
    """The model of a supervised description, its stems and layers trained on rows with labels; the same for the same seed."""
    trained = build_model(description, seed).train()
    inputs = [torch.from_numpy(np.ascontiguousarray(public[modality])) for modality in description.modalities]
    label = torch.from_numpy(public[LABEL])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    order = np.random.default_rng([seed, 8])
    for _ in range(EPOCHS):
        for rows in torch.from_numpy(order.permutation(len(label))).split(BATCH):
            (logits,) = trained(*(each[rows] for each in inputs))
            optimizer.zero_grad()
            cross_entropy(logits, label[rows]).backward()
            optimizer.step()
    fresh = build_model(description, seed)
    for modality, encoder in fresh.encoders.items():
        for part in ("stem", "layers"):
            getattr(encoder, part).load_state_dict(getattr(trained.encoders[modality], part).state_dict())
    return fresh
