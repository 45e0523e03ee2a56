"""A model as PyTorch has it, to look at what it has learnt: embeddings for retrieval, features for a linear probe."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.methods.data_sets import Arrays
from benchmarks.simulate.simulation import SimulationResult
from export.assemble import attached_model
from export.graphs.cut import find_segments
from export.models.models import MultimodalModel, build_model
from lamina.encoding.tensors import Float32
from lamina.plans.model import ModelDescription
from lamina.plans.plan import Plan

_CHUNK = 256


def load_weights(model: MultimodalModel, description: ModelDescription, weights: Mapping[str, Mapping[str, Float32]]) -> None:
    """Segment -> tensors, as the run has them, into the model's parameters; segments that the model lacks are left out."""
    with torch.no_grad():
        for name, module in find_segments(model, description).items():
            for key, parameter in module.named_parameters():
                parameter.copy_(torch.from_numpy(weights[name][key]))


class TrainedModel:
    """The layers that a plan attaches, with the final weights of its run; without a run, as they start."""

    def __init__(self, plan: Plan, result: SimulationResult | None = None) -> None:
        description = attached_model(plan)
        self._model: MultimodalModel = build_model(description, plan.seed).eval()
        if result is not None:
            load_weights(self._model, description, result.weights)

    def embeddings(self, arrays: Arrays) -> dict[str, NDArray[np.float32]]:
        """What the loss sees, (n, output) for each modality."""
        return self._in_chunks(arrays, self._model.embed)

    def features(self, arrays: Arrays) -> dict[str, NDArray[np.float32]]:
        """What the encoders give to their projections, (n, width) for each modality."""
        return self._in_chunks(arrays, self._model.pool)

    def _in_chunks(self, arrays: Arrays, run) -> dict[str, NDArray[np.float32]]:  # type: ignore[no-untyped-def]
        modalities = list(self._model.encoders)
        count = len(arrays[modalities[0]])
        parts: dict[str, list[NDArray[np.float32]]] = {modality: [] for modality in modalities}
        with torch.no_grad():
            for first in range(0, count, _CHUNK):
                rows = {m: torch.from_numpy(np.ascontiguousarray(arrays[m][first : first + _CHUNK])) for m in modalities}
                for modality, value in run(rows).items():
                    parts[modality].append(value.numpy())
        return {modality: np.concatenate(values) for modality, values in parts.items()}
