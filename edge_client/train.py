"""One round on one device: local epochs of seeded batches, with a fresh optimiser; and the evaluation of a model.

The order of the examples depends on the plan's seed, the stage, the round and the device's name, and on nothing else: a
device that was killed in the middle of a round trains the same round again, to the same bits.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from edge_client.optimizers import make_optimizer
from edge_client.progress import Progress, Say
from edge_client.rows import RowFile
from edge_client.stage_model import StageModel
from lamina.errors import DataError
from lamina.plan import Plan
from lamina.wire import Evaluation

Inputs = Mapping[str, RowFile]
"""Rows by input name: a modality's raw data or cached features, and the label."""


@dataclass(frozen=True)
class Trained:
    """What training cost and reached: the mean loss over all examples of all local epochs."""

    num_examples: int
    loss: float
    train_seconds: float


def train_round(
    model: StageModel,
    inputs: Inputs,
    plan: Plan,
    stage: int,
    round: int,
    device: str,
    say: Say,
    on_batch: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Trained:
    """Trains the model's parameters in place. Raises DataError if the device has too few examples for one batch."""
    started = clock()
    settings = plan.training
    optimizer = make_optimizer(settings.optimizer, model.parameters.size, plan.stages[stage].learning_rate)
    order = shuffler(plan.seed, stage, round, device)
    examples = min(len(rows) for rows in inputs.values())
    progress = Progress(say, f"stage {stage}, round {round}, examples", examples * settings.local_epochs)
    total, seen = 0.0, 0
    for _ in range(settings.local_epochs):
        for indices in batches(order.permutation(examples), settings.batch_size, plan):
            model.gradient.fill(0)
            loss, _ = model.gradients({name: rows.take(indices) for name, rows in inputs.items()})
            optimizer.step(model.parameters, model.gradient)
            total, seen = total + loss * len(indices), seen + len(indices)
            progress.at(seen)
            on_batch()
    if not seen:
        raise DataError(f"{examples} training example is too few: the contrastive objective needs at least 2")
    return Trained(examples, total / seen, clock() - started)


def evaluate(
    model: StageModel, inputs: Inputs, plan: Plan, say: Say, on_batch: Callable[[], None] = lambda: None
) -> Evaluation:
    """The model on these rows in their own order; no rows give an evaluation of 0 examples."""
    examples = min((len(rows) for rows in inputs.values()), default=0)
    progress = Progress(say, "evaluation, examples", examples)
    total, seen, right = 0.0, 0, 0
    for indices in batches(np.arange(examples), plan.training.batch_size, plan):
        loss, correct = model.evaluate({name: rows.take(indices) for name, rows in inputs.items()})
        total, seen, right = total + loss * len(indices), seen + len(indices), right + correct
        progress.at(seen)
        on_batch()
    return Evaluation(num_examples=seen, correct=right, loss=total / seen if seen else 0.0)


def batches(order: NDArray[np.int64], size: int, plan: Plan) -> Iterator[NDArray[np.int64]]:
    """Pieces of `size`, the last one shorter; a contrastive batch of 1 has nothing to tell apart and is left out."""
    smallest = 2 if plan.model.objective.kind == "contrastive" else 1
    for start in range(0, len(order), size):
        piece = order[start : start + size]
        if len(piece) >= smallest:
            yield piece


def shuffler(seed: int, stage: int, round: int, device: str) -> np.random.Generator:
    key = sha256(f"{seed}/{stage}/{round}/{device}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
