"""One round on one device: local epochs of seeded batches; and the evaluation of a model.

The order of the examples depends on the plan's seed, the stage, the round and the device's name, and on nothing else: a
device that was killed in the middle of a round trains the same round again, to the same bits.

A self-supervised batch has two views of the same examples (`edge_client.versions`).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from edge_client import versions
from edge_client.job import Job
from edge_client.progress import Progress, Say
from edge_client.rows.row_files import RowSource
from edge_client.train.optimizers import Optimizer, make_optimizer
from edge_client.train.stage_model import Read, StageModel
from lamina.errors import DataError
from lamina.names import second_view

Inputs = Mapping[str, RowSource]
"""Rows by input name: a modality's raw data or cached features, and the label."""


@dataclass(frozen=True)
class Trained:
    """What training cost and reached: the mean loss over all examples of all local epochs."""

    num_examples: int
    loss: float
    train_seconds: float


@dataclass(frozen=True)
class Evaluated:
    num_examples: int
    correct: int
    loss: float


def train_round(
    model: StageModel,
    views: Sequence[Inputs],
    job: Job,
    say: Say,
    on_batch: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    optimizer: Optimizer | None = None,
) -> Trained:
    """Trains the model's parameters in place. Raises DataError if the device has too few examples for one batch.

    `views` are the versions of the inputs; the epochs of the stage take them in turn (`edge_client.versions`). Without an
    `optimizer`, a fresh one.
    """
    started = clock()
    optimizer = optimizer or fresh_optimizer(job, model.parameters.size)
    order = shuffler(job)
    progress = Progress(say, f"{job.where}, examples", job.examples * job.local_epochs)
    total, seen = 0.0, 0
    for epoch in job.epochs:
        read = reader(epoch_inputs(views, job, epoch))
        for indices in batches(shuffled(job.examples, order), job):
            loss, _ = model.gradients(read, indices)
            if job.proximal:
                model.add_proximal(job.proximal)
            optimizer.step(model.parameters, model.gradient)
            model.follow(job.momentum)
            total, seen = total + loss * len(indices), seen + len(indices)
            progress.at(seen)
            on_batch()
    if not seen:
        kind = job.objective.replace("_", "-")
        raise DataError(f"{job.examples} training example is too few: the {kind} objective needs at least 2")
    return Trained(job.examples, total / seen, clock() - started)


def fresh_optimizer(job: Job, count: int) -> Optimizer:
    """One for the job's active segments, `count` parameters in all, each segment with its own learning rate."""
    sizes = [sum(tensor.count for tensor in segment.tensors) for segment in job.active]
    groups = list(zip(sizes, job.rate_scales, strict=True)) if job.rate_scales else ()
    return make_optimizer(job.optimizer, count, job.learning_rate, groups)


def epoch_inputs(views: Sequence[Inputs], job: Job, epoch: int) -> Inputs:
    """The inputs of an epoch of the stage, counted from 0 over all its rounds."""
    first, *others = (views[version] for version in versions.of_epoch(epoch, len(views), job.takes_pairs_of_views))
    return {**first, **{second_view(name): rows for second in others for name, rows in second.items()}}


def evaluate(model: StageModel, inputs: Inputs, job: Job, say: Say, on_batch: Callable[[], None] = lambda: None) -> Evaluated:
    """The model on these rows in their own order; no rows give an evaluation of 0 examples."""
    progress = Progress(say, "evaluation, examples", job.examples)
    read = reader(inputs)
    total, seen, right = 0.0, 0, 0
    for indices in batches(range(job.examples), job):
        loss, correct = model.evaluate(read, indices)
        total, seen, right = total + loss * len(indices), seen + len(indices), right + correct
        progress.at(seen)
        on_batch()
    return Evaluated(num_examples=seen, correct=right, loss=total / seen if seen else 0.0)


def reader(inputs: Inputs) -> Read:
    return lambda indices: {name: np.ascontiguousarray(rows.take(indices)) for name, rows in inputs.items()}


def batches(order: Sequence[int], job: Job) -> Iterator[Sequence[int]]:
    """Pieces of the batch size, the last one shorter. Where the loss compares samples, a batch of 1 has nothing to compare
    and is left out."""
    smallest = 1 if job.objective == "supervised" else 2
    for start in range(0, len(order), job.batch_size):
        piece = order[start : start + job.batch_size]
        if len(piece) >= smallest:
            yield piece


def shuffler(job: Job) -> Random:
    # Python's own generator: numpy's would cost a device 6 MiB of imports.
    return Random(f"{job.seed}/{job.stage}/{job.round}/{job.device}")


def shuffled(count: int, order: Random) -> list[int]:
    indices = list(range(count))
    order.shuffle(indices)
    return indices
