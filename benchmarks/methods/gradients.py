"""How large the gradient is that each trained layer gets, between the rounds of a run.

PyTorch computes it, on the same rows each time, for the model as it is attached in that stage. The norm is that of all
parameters of a layer, over the modalities that have it. It says how strongly the loss still pulls at a layer, and so whether
training reaches it; it is not what a device does with it, because AdamW scales each parameter's gradient.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch.nn import functional as F

from benchmarks.methods.data_sets import Arrays
from benchmarks.methods.trained import load_weights
from benchmarks.simulate.simulation import ReadWeights, Round
from export.assemble import attached_model
from export.models.models import build_model
from lamina.names import LABEL
from lamina.plans.plan import Plan

ROWS = 256


class GradientProbe:
    """To be called after each round; `by_round` has one list for each, with the norm by layer and None where it is frozen."""

    def __init__(self, plan: Plan, train: Arrays) -> None:
        count = len(train[LABEL])
        rows = np.sort(np.random.default_rng([plan.seed, 9]).permutation(count)[:ROWS])
        self._plan = plan
        self._inputs = [torch.from_numpy(np.ascontiguousarray(train[modality][rows])) for modality in plan.model.modalities]
        self._label = torch.from_numpy(train[LABEL][rows])
        self.by_round: list[list[float | None]] = []

    def __call__(self, each: Round, read_weights: ReadWeights) -> None:
        stage = self._plan.stages[each.stage]
        until_now = self._plan.model_copy(update={"stages": self._plan.stages[: stage.index + 1]})
        description = attached_model(until_now)
        model = build_model(description, self._plan.seed)
        load_weights(model, description, read_weights())
        (logits,) = model(*self._inputs)
        F.cross_entropy(logits, self._label).backward()
        squares: list[float | None] = [None] * max(encoder.layers for encoder in self._plan.model.encoders)
        for name, module in model.segments().items():
            kind, _, index = name.partition(".")[2].partition(".")
            if kind == "layers" and name in stage.active:
                found = sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None)
                squares[int(index)] = (squares[int(index)] or 0.0) + found
        self.by_round.append([None if square is None else float(f"{square**0.5:.4g}") for square in squares])


def summarise_gradients(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each (data, setting, method) that was probed: the mean norm by layer over the rounds in which it is trained
    and over seeds, and `first_to_last`, the norm of layer 0 over that of the deepest layer of its round."""
    probed = [row for row in rows if row.get("gradient_by_round")]
    entries = []
    for data, setting, method in dict.fromkeys((row["data"], row["setting"], row["method"]) for row in probed):
        mine = [row for row in probed if (row["data"], row["setting"], row["method"]) == (data, setting, method)]
        rounds = [norms for row in mine for norms in row["gradient_by_round"]]
        by_layer = [[value for value in column if value is not None] for column in zip(*rounds, strict=True)]
        trained = [[value for value in norms if value is not None] for norms in rounds]
        both = [norms[0] / norms[-1] for norms in trained if len(norms) > 1 and norms[-1] > 0]
        entries.append(
            {
                "data": data,
                "setting": setting,
                "method": method,
                "seeds": [row["seed"] for row in mine],
                "norm_by_layer": [statistics.mean(values) if values else None for values in by_layer],
                "first_to_last": statistics.median(both) if both else None,
            }
        )
    return entries


def gradient_table(entries: Sequence[dict[str, Any]]) -> Table:
    """Norms by layer, from the first to the last."""
    table = Table(title="gradient of the layers that train, mean over rounds and seeds")
    for heading in ("data", "setting", "method", "norm by layer", "first to last"):
        table.add_column(heading)
    for entry in entries:
        norms = " ".join("-" if norm is None else f"{norm:.2f}" for norm in entry["norm_by_layer"])
        ratio = "-" if entry["first_to_last"] is None else f"{entry['first_to_last']:.2f}"
        table.add_row(entry["data"], entry["setting"], entry["method"], norms, ratio)
    return table
