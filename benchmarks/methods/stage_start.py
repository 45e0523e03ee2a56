"""What a change of stages does to the model before anybody trains it: the shock that the papers' curves show.

They test the global model at the start of a round, so the first point of a stage is that of layers which were attached a moment
ago and never trained. A row's `accuracy_by_round` is of the end of a round, when a shock may have been mended already.
"""

from typing import Any

import numpy as np
import torch

from benchmarks.methods.data_sets import Arrays
from benchmarks.methods.trained import load_weights
from benchmarks.simulate.simulation import ReadWeights, Round
from export.assemble import attached_model
from export.models.models import build_model
from lamina.names import LABEL
from lamina.plans.plan import Plan


class StageStartProbe:
    """To be called after each round. `by_stage` has, for each change of stages, the stage that begins and the test accuracy
    with its layers attached, as PyTorch computes it. A stage that ends before its rounds are over (self-tuning) is left out."""

    def __init__(self, plan: Plan, test: Arrays) -> None:
        self._plan = plan
        self._inputs = [torch.from_numpy(np.ascontiguousarray(test[modality])) for modality in plan.model.modalities]
        self._label = torch.from_numpy(test[LABEL])
        self.by_stage: list[dict[str, Any]] = []

    def __call__(self, each: Round, read_weights: ReadWeights) -> None:
        later = [stage.index for stage in self._plan.stages[each.stage + 1 :] if stage.rounds]
        if not later or each.round + 1 < self._plan.stages[each.stage].rounds:
            return
        until_then = self._plan.model_copy(update={"stages": self._plan.stages[: later[0] + 1]})
        description = attached_model(until_then)
        model = build_model(description, self._plan.seed).eval()
        load_weights(model, description, read_weights())
        with torch.no_grad():
            (logits,) = model(*self._inputs)
        right = float((logits.argmax(dim=-1) == self._label).double().mean())
        self.by_stage.append({"stage": later[0], "accuracy": round(right, 5)})
