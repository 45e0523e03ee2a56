"""One cell to its row of results: deal the data, simulate the plan, score the final weights, count the costs.

The score is the test accuracy of a supervised model; the mean of image-to-text and text-to-image recall at 5 of a contrastive
one, where the data say which answers are right; and else the accuracy of a linear probe on the final features.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.demo.federated import federated_run
from benchmarks.methods.bounds import linear_accuracy, linear_recalls
from benchmarks.methods.cells import CENTRALISED, LINEAR, UNTRAINED, Cell
from benchmarks.methods.costs import costs_of
from benchmarks.methods.data_sets import DATA_SETS, Arrays, Loaded, deal, deal_server
from benchmarks.methods.gradients import GradientProbe
from benchmarks.methods.plans import ALL, BASELINE, METHODS, REAL, SELF_SUPERVISED_BASELINE
from benchmarks.methods.pretraining import pretrained_model
from benchmarks.methods.retrieval import both_ways, mean_recall
from benchmarks.methods.stage_start import StageStartProbe
from benchmarks.methods.trained import TrainedModel
from benchmarks.simulate.simulation import OnRound, ReadWeights, Round, SimulationResult, simulate
from lamina.bundles.manifest import EngineName
from lamina.encoding.tensors import hash_bytes
from lamina.errors import ConfigError, LaminaError
from lamina.names import LABEL
from lamina.plans.plan import Plan

ENGINE: EngineName = "torch" if torch.cuda.is_available() else "onnxruntime"


def plan_of(cell: Cell) -> Plan | None:
    """The plan of a cell; None for the linear bound. Raises ConfigError for a method that is not known."""
    if cell.method == LINEAR:
        return None
    baseline = SELF_SUPERVISED_BASELINE if cell.data.startswith("fashion") else BASELINE
    name = baseline if cell.method in (CENTRALISED, UNTRAINED) else cell.method
    if name not in ALL or cell.data not in DATA_SETS:
        raise ConfigError(f"{cell.key}: known methods are {', '.join(ALL)}; known data {', '.join(DATA_SETS)}")
    clients = max(1, round(cell.setting.clients * cell.setting.participation))
    return ALL[name](DATA_SETS[cell.data].model, cell.rounds, clients, cell.seed)


def plan_hash(cell: Cell) -> str:
    """Tells whether a row was made with the plan that the cell has now. Settings at their defaults do not count, so that new
    options of the plan leave old rows valid."""
    plan = plan_of(cell)
    return hash_bytes(plan.model_dump_json(exclude_defaults=True).encode())[:16] if plan else LINEAR


def run_cell(cell: Cell) -> dict[str, Any]:
    """Raises DataError if the data cannot be had, and what exporting and training raise."""
    started = time.monotonic()
    plan = plan_of(cell)
    loaded = DATA_SETS[cell.data].load(cell.seed)
    row = cell.as_row() | {"plan": plan_hash(cell)}
    if plan is None:
        if loaded.test_groups is None:
            accuracy, penalty = linear_accuracy(loaded, cell.seed)
            row |= {"score": accuracy, "score_is": "test accuracy", "penalty": penalty}
        else:
            recalls, penalty = linear_recalls(loaded, cell.seed)
            row |= _of_recalls(recalls) | {"penalty": penalty}
        return row | {"seconds": time.monotonic() - started}
    if cell.method == UNTRAINED:
        return row | probe(TrainedModel(plan), loaded, cell.seed) | {"seconds": time.monotonic() - started}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = deal_cell(cell, plan, loaded, folder / "data")
        if cell.method in REAL:
            return row | run_processes(plan, files, folder / "run") | {"seconds": time.monotonic() - started}
        server = deal_server(loaded, folder / "data") if plan.calibration else None
        is_labelled = plan.model.objective.kind == "supervised"
        gradients = GradientProbe(plan, loaded.train) if cell.method in METHODS and is_labelled else None
        starts = StageStartProbe(plan, loaded.test) if len(plan.stages) > 1 and is_labelled else None
        probes = [probe for probe in (gradients, starts) if probe is not None]
        start = pretrained_model(plan.model, loaded.public, cell.seed) if loaded.public is not None else None
        result = simulate(plan, files, folder / "run", ENGINE, cell.setting.participation, _all_of(probes), server, start)
    seconds = {"seconds": time.monotonic() - started}
    row |= {"gradient_by_round": gradients.by_round} if gradients else {}
    row |= {"stage_starts": starts.by_stage} if starts else {}
    row |= {"engine": ENGINE}
    return row | score(result, loaded) | describe(result) | {"cpu_seconds": result.cpu_seconds} | seconds


def _all_of(probes: Sequence[OnRound]) -> OnRound:
    def on_round(each: Round, read_weights: ReadWeights) -> None:
        for probe in probes:
            probe(each, read_weights)

    return on_round


def run_processes(plan: Plan, files: Sequence[Path], folder: Path) -> dict[str, Any]:
    """The score of a run of a coordinator and devices, each a process of its own, over HTTP on loopback."""
    _, status = federated_run(plan, files, [ENGINE] * len(files), folder)
    course = [(each.stage, each.test_accuracy) for each in status.rounds]
    return {
        "score": course[-1][1],
        "score_is": "test accuracy",
        "stage_by_round": [stage for stage, _ in course],
        "accuracy_by_round": [None if accuracy is None else round(accuracy, 5) for _, accuracy in course],
    }


def deal_cell(cell: Cell, plan: Plan, loaded: Loaded, folder: Path) -> list[Path]:
    """The files of the clients that can take part in this plan."""
    setting = cell.setting
    limited = setting.lacking or setting.small
    files = deal(loaded, setting.split, setting.clients, cell.seed, folder, limited, are_whole=not setting.lacking)
    is_open = bool(plan.device_modalities) if setting.lacking else plan.strategy == "layerwise"
    return files if is_open or not limited else files[: len(files) - round(limited * len(files))]


def row_or_error(cell: Cell) -> dict[str, Any] | str:
    """The row, or the error that ended the cell. It lives here because worker processes cannot import `__main__`."""
    try:
        return run_cell(cell)
    except LaminaError as error:
        return f"{error.code}: {error.message}"


def score(result: SimulationResult, loaded: Loaded) -> dict[str, Any]:
    """`score`, what it is, and what it was made of."""
    plan = result.manifest.plan
    if plan.model.objective.kind == "supervised":
        return {"score": result.test_accuracy, "score_is": "test accuracy"}
    model = TrainedModel(plan, result)
    if plan.model.objective.kind == "self_supervised" or (loaded.test_groups is None and LABEL in loaded.test):
        return probe(model, loaded, plan.seed)
    if loaded.test_groups is None:
        raise ConfigError(f"{plan.name}: recall needs data that say what counts as the same answer (Loaded.test_groups)")
    found = model.embeddings(loaded.test)
    return _of_recalls(both_ways(found["image"], found["text"], loaded.test_groups))


def _of_recalls(recalls: dict[str, float]) -> dict[str, Any]:
    return {"score": mean_recall(recalls, 5), "score_is": "recall at 5", **recalls}


def probe(model: TrainedModel, loaded: Loaded, seed: int) -> dict[str, Any]:
    """Accuracy of a linear model on the encoders' features; it alone sees the labels."""

    def features_of(arrays: Arrays) -> Arrays:
        return {**model.features(arrays), LABEL: arrays[LABEL]}

    train = features_of(loaded.train)
    accuracy, penalty = linear_accuracy(Loaded(train, features_of(loaded.test)), seed)
    row = {"score": accuracy, "score_is": "linear probe accuracy", "penalty": penalty}
    if loaded.held_out is not None:
        row["held_out_score"], _ = linear_accuracy(Loaded(train, features_of(loaded.held_out)), seed)
    return row


def describe(result: SimulationResult) -> dict[str, Any]:
    """Costs, and the course of the run round by round."""
    return {
        "devices": len(result.devices),
        **costs_of(result, ENGINE).as_row(),
        "stage_by_round": [each.stage for each in result.rounds],
        "train_loss_by_round": [round(each.train_loss, 5) for each in result.rounds],
        "accuracy_by_round": [None if each.test_accuracy is None else round(each.test_accuracy, 5) for each in result.rounds],
    }
