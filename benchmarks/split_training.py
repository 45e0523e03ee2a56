"""What does split training learn, what does it move, and what does the transfer loss do to it?

Question   Test accuracy of image, audio and their fusion, bytes of a step, and the round of the switch: with the transfer loss
           as released, with its two mends (docs/split.md), and without any; with the coordinator in the loop and without.
Method     `plans/split/m2fedsa.toml` on AV-Digits clean, with a random backbone. Two users with 480 examples of both
           modalities each, through real processes on ONNX Runtime: `lamina serve --split`, two times `lamina split join`. Each
           tests on half of the 500 test examples. The switch is forced: a window of 3 and a threshold that any loss passes, so
           rounds 0 to 3 come before it; "no transfer" has a threshold that none passes. "on the device" is `party = "device"`
           with int8 layers. The rows of encodings have 4 rounds, of which the last comes after the switch. In "one modality,
           taking part" two more users, of 480 examples each, have images alone and audio alone; in "one modality, left out" the
           first user is by itself; neither has transfer, and in both the first user alone tests, on all 500. The bounds are
           eager PyTorch on the examples of both users in one place: as many epochs as there are rounds, the losses of before
           the switch, the optimiser never started afresh; with the adapters alone, and with all layers trained.
Not shown  Pretrained backbones, which the method is for; users with some of the modalities after the switch; other learning
           rates than that of the plan file. Bytes of rounds are bodies as a user reports them. A report comes before its own
           update and evaluation, so `bytes_*_per_round` are means over the reports from the second round on, which hold those
           of the round before, and `bytes_*_in_all` lack the last update and the last evaluation. The download of the first
           round has the programs and the device's frozen parts. Wall seconds are those of a shared machine, from the first
           user's start; CPU seconds are those of all processes with their start, and of the training alone for the bounds.

    python -m benchmarks.split_training [--seeds 0,1,2] [--rows NAME,NAME] [--fresh]

A run that stands in the results file already is not done again, unless --fresh is given.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import results_file
from benchmarks.data.av_digits import load_av_digits
from benchmarks.demo.processes import Processes
from export.split.functions import split_functions
from export.split.split import export_split, make_parts
from lamina.client import read_token
from lamina.errors import LaminaError
from lamina.names import LABEL
from lamina.plans.plan import AdamW
from lamina.split.client import SplitClient
from lamina.split.manifest import SplitManifest
from lamina.split.plan import FUSION, SplitPlan
from lamina.split.wire import SplitRound, SplitStatus

RESULT, COMMAND = "split-training", "make bench-split"
PLAN = Path(__file__).parent / "plans" / "split" / "m2fedsa.toml"
USERS, EXAMPLES, ROUNDS, WINDOW, EVALUATE_EVERY = 2, 480, 10, 3, 2
BOTH = ("image", "audio")
ALWAYS, NEVER = 1e6, 1e-30
"""Thresholds of the switch."""
TIMEOUT_SECONDS, _POLL_SECONDS = 1800.0, 0.25
Row = dict[str, Any]
Arrays = Mapping[str, NDArray[Any]]
"""By modality, and `label`."""
Load = Callable[[int], tuple[Arrays, Arrays]]
"""Seed -> (train, test)."""


@dataclass(frozen=True)
class Case:
    """`changes` are of the plan; `has` are the modalities of each user. A bound trains `all_layers` or the adapters alone, in
    one place; None: it is no bound."""

    what: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    all_layers: bool | None = None
    seeds: int = 3
    has: tuple[tuple[str, ...], ...] = (BOTH,) * USERS


def _encoding(name: str, compression: str = "none") -> Case:
    changes = {
        "traffic": {"activations": name, "gradients": name, "compression": compression},
        "rounds": 4,
        "switch": {"window": 2, "threshold": ALWAYS},
        "users": {"size": USERS, "min_users": USERS, "evaluate_every": 4},
    }
    return Case(f"{name} {compression}".removesuffix(" none"), changes, seeds=1)


AS_RELEASED, MENDED, NO_TRANSFER, ON_DEVICE = "transfer as released", "transfer mended", "no transfer", "on the device"
CASES = (
    Case(NO_TRANSFER, {"switch": {"window": WINDOW, "threshold": NEVER}}),
    Case(AS_RELEASED, {"transfer": {"reduction": "sum", "detach": False}}),
    Case(MENDED, {"transfer": {"reduction": "mean", "detach": True}}),
    Case(ON_DEVICE, {"party": "device", "frozen_precision": "int8"}),
    Case("bound: adapters", all_layers=False),
    Case("bound: all layers", all_layers=True),
    Case("one modality, left out", {"switch": {"window": WINDOW, "threshold": NEVER}}, has=(BOTH,)),
    Case("one modality, taking part", {"switch": {"window": WINDOW, "threshold": NEVER}}, has=(BOTH, ("image",), ("audio",))),
    _encoding("fp32"),
    _encoding("fp16"),
    _encoding("fp16", "zstd"),
    _encoding("int8"),
    _encoding("int8", "zstd"),
)


def plan_of(case: Case, base: SplitPlan, seed: int) -> SplitPlan:
    """The plan of a run: that of the file, the settings of this benchmark, the changes of the case."""
    settings = {
        "rounds": ROUNDS,
        "switch": {"window": WINDOW, "threshold": ALWAYS},
        "users": {
            "size": len(case.has),
            "min_users": len(case.has),
            "some_modalities": {*case.has} != {BOTH},
            "evaluate_every": EVALUATE_EVERY,
        },
        "seed": seed,
    }
    return SplitPlan.model_validate(base.model_dump() | settings | dict(case.changes))


def load(seed: int) -> tuple[Arrays, Arrays]:
    """AV-Digits clean."""
    train, test = load_av_digits("clean", seed)
    found = [{"image": part.image, "audio": part.audio, LABEL: part.label} for part in (train, test)]
    return found[0], found[1]


def deal(train: Arrays, seed: int, users: int = USERS) -> list[NDArray[np.intp]]:
    """The training rows of each user, drawn without overlap; those of the first are the same however many follow."""
    order = np.random.default_rng(seed).permutation(len(train[LABEL]))
    share = min(EXAMPLES, len(order) // max(users, USERS))
    return [order[user * share : (user + 1) * share] for user in range(users)]


def measure(case: Case, base: SplitPlan, data: tuple[Arrays, Arrays], seed: int, folder: Path) -> Row:
    """One row: a run of real processes, or a bound."""
    plan, (train, test) = plan_of(case, base, seed), data
    rows = deal(train, seed, len(case.has))
    if case.all_layers is not None:
        return {"what": case.what, "seed": seed} | pooled(plan, train, test, rows, case.all_layers)
    files: list[Path] = []
    testers = case.has.count(BOTH)  # they come first
    for user, (mine, has) in enumerate(zip(rows, case.has, strict=True)):
        kept = (*has, LABEL)
        arrays = {f"train_{name}": train[name][mine] for name in kept}
        arrays |= {f"test_{name}": test[name][user::testers] if has == BOTH else test[name][:0] for name in kept}
        files.append(folder / f"data-{user}.npz")
        np.savez(files[-1], **arrays)
    manifest = export_split(plan, folder / "bundle", ("onnxruntime",))
    status, seconds = split_run(manifest, folder, files)
    return {"what": case.what, "seed": seed} | run_row(plan, manifest, status) | seconds


def split_run(manifest: SplitManifest, folder: Path, files: Sequence[Path]) -> tuple[SplitStatus, Row]:
    """Trains the bundle in `folder` to the end. Raises LaminaError if a process ends early or time is up."""
    cpu_before = _children_seconds()
    with Processes(folder / "logs") as processes:
        state = folder / "coordinator"
        waits = ["--wait-seconds-min", "0.02", "--wait-seconds-max", "0.05"]
        processes.start("coordinator", ["serve", "--state", str(state), "--port", "0", "--split", "onnxruntime", *waits])
        url = processes.wait_for_file(state / "address", timeout_seconds=120)
        token = ["--token-file", str(state / "enrolment.token")]
        with SplitClient(url, read_token(state / "admin.token")) as client:
            run = client.publish_split(folder / "bundle", manifest).run
            begin = time.monotonic()
            for user, file in enumerate(files):
                options = ["--data", str(file), "--name", f"user-{user}", "--engine", "onnxruntime"]
                processes.start(
                    f"user-{user}", ["split", "join", url, *options, "--state", str(folder / f"user-{user}"), *token]
                )
            while (status := client.split_run(run)).state != "finished":
                processes.check()
                if time.monotonic() > begin + TIMEOUT_SECONDS:
                    raise LaminaError(
                        f"{run} was not finished within {TIMEOUT_SECONDS:.0f} s: {status.detail}; logs: {folder / 'logs'}"
                    )
                time.sleep(_POLL_SECONDS)
            wall = time.monotonic() - begin
    # The processes are over, so that the kernel has added up what they took.
    return status, {"wall_seconds": wall, "cpu_seconds": _children_seconds() - cpu_before}


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_row(plan: SplitPlan, manifest: SplitManifest, status: SplitStatus) -> Row:
    """What a finished run says: accuracies, the switch, bytes."""
    before = [row for row in status.rounds if not row.fused]
    after = [row for row in status.rounds if row.fused]
    evaluated = [row for row in status.rounds if row.test_examples]
    # A report counts the update and the evaluation of the round before; the first one counts programs and frozen parts.
    first, *others = ([user.report for user in row.users] for row in status.rounds)
    reports = [report for row in others for report in row]
    return {
        "rounds": len(status.rounds),
        "switch_round": after[0].round if after else None,
        "accuracy": _accuracy(plan, evaluated[-1]),
        "accuracy_by_round": [{"round": row.round, "after_switch": row.fused} | _accuracy(plan, row) for row in evaluated],
        "trained_parameters": {
            "all": sum(part.parameters for part in manifest.parts if part.name in plan.trained),
            FUSION: manifest.part(FUSION).parameters,
        },
        "step_bytes": _step_bytes(before),
        "step_bytes_after_switch": _step_bytes(after),
        "bytes_up_per_round": _mean(report.bytes_up for report in reports),
        "bytes_down_per_round": _mean(report.bytes_down for report in reports),
        "bytes_up_in_all": sum(report.bytes_up for report in (*first, *reports)) / len(first),
        "bytes_down_in_all": sum(report.bytes_down for report in (*first, *reports)) / len(first),
        "peak_bytes": max(user.report.peak_bytes for row in status.rounds for user in row.users),
    }


def _accuracy(plan: SplitPlan, row: SplitRound) -> Row:
    return {m: row.test_accuracy(m) for m in plan.modalities} | {FUSION: row.test_accuracy()}


def _step_bytes(rounds: Sequence[SplitRound]) -> Row | None:
    """Means of the bodies of a training step; None where no steps were sent."""
    steps = sum(row.traffic.steps for row in rounds)
    if not steps:
        return None
    names = ("features_up", "features_down", "gradients_up", "gradients_down")
    found = {name: sum(getattr(row.traffic, f"{name}_bytes") for row in rounds) / steps for name in names}
    return found | {"all": sum(found.values()), "steps": steps}


def _mean(values: Iterator[int]) -> float | None:
    found = list(values)
    return statistics.mean(found) if found else None


class Whole(nn.Module):
    """The unsplit model: raw inputs of all modalities, label -> what `export.split.modules.DeviceStep` gives."""

    def __init__(self, plan: SplitPlan, all_layers: bool) -> None:
        super().__init__()
        parts = make_parts(plan)
        functions = {f.name: f for f in split_functions(plan.model_copy(update={"party": "device"}), parts)}
        self.prefixes = nn.ModuleList(functions[f"{m}.prefix"].module for m in plan.modalities)
        self.step = functions["step"].module
        trained = set(parts) if all_layers else set(plan.trained)
        for name, module in parts.items():
            module.requires_grad_(name in trained)
        self.groups = [
            {"params": [p for n, module in parts.items() if n in trained and n != FUSION for p in module.parameters()]},
            {"params": list(parts[FUSION].parameters()), "lr": plan.fusion.learning_rate},
        ]

    def forward(self, inputs: Sequence[Tensor], label: Tensor) -> tuple[Tensor, ...]:
        ends = [value for prefix, x in zip(self.prefixes, inputs, strict=True) for value in prefix(x)]
        found: tuple[Tensor, ...] = self.step(*ends, label)
        return found


def pooled(plan: SplitPlan, train: Arrays, test: Arrays, rows: Sequence[NDArray[np.intp]], all_layers: bool) -> Row:
    """The bound: all users' examples in one place, as many passes over them as the plan has rounds."""
    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)
    model, training = Whole(plan, all_layers), plan.training
    chosen = training.optimizer
    assert isinstance(chosen, AdamW)
    betas = (chosen.beta1, chosen.beta2)
    optimizer = torch.optim.AdamW(
        model.groups, lr=training.learning_rate, betas=betas, eps=chosen.eps, weight_decay=chosen.weight_decay
    )
    mine, random = np.concatenate(rows), np.random.default_rng([plan.seed, 2])
    wall, cpu = time.monotonic(), time.process_time()
    for _ in range(plan.rounds * training.local_epochs):
        order = random.permutation(mine)
        for first in range(0, len(order), training.batch_size):
            optimizer.zero_grad()
            model(*_batch(plan, train, order[first : first + training.batch_size]))[0].backward()
            optimizer.step()
    seconds = {"wall_seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
    right = np.zeros(len(plan.modalities) + 1)
    with torch.no_grad():
        for first in range(0, len(test[LABEL]), training.batch_size):
            found = model(*_batch(plan, test, np.arange(first, min(first + training.batch_size, len(test[LABEL])))))
            right += [float(count) for count in found[-len(right) :]]
    accuracy = dict(zip((*plan.modalities, FUSION), (right / len(test[LABEL])).tolist(), strict=True))
    return {"rounds": plan.rounds, "switch_round": None, "accuracy": accuracy} | seconds


def _batch(plan: SplitPlan, data: Arrays, rows: NDArray[np.intp]) -> tuple[list[Tensor], Tensor]:
    return [torch.from_numpy(data[m][rows]) for m in plan.modalities], torch.from_numpy(data[LABEL][rows])


def run(
    cases: Sequence[Case], seeds: Sequence[int], base: SplitPlan, load: Load, console: Console, is_fresh: bool = False
) -> list[Row]:
    """All rows, those of the results file included; the file is written after each."""
    rows = [] if is_fresh else known_rows()
    for case in cases:
        for seed in seeds[: case.seeds]:
            if any((row["what"], row["seed"]) == (case.what, seed) for row in rows):
                continue
            with TemporaryDirectory() as folder:
                rows.append(measure(case, base, load(seed), seed, Path(folder)))
            found = ", ".join(f"{name} {_percent(value)}" for name, value in rows[-1]["accuracy"].items())
            console.print(f"{case.what}, seed {seed}: {found}; {rows[-1]['wall_seconds']:.0f} s", highlight=False)
            write_rows(rows, base)
    return rows


def known_rows() -> list[Row]:
    path = results_file.RESULTS / f"{RESULT}.json"
    found: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    return found


def write_rows(rows: list[Row], base: SplitPlan) -> Path:
    settings = {"users": USERS, "examples_per_user": EXAMPLES, "batch_size": base.training.batch_size}
    facts = settings | {"plan": f"benchmarks/plans/split/{PLAN.name}", "means": summary(rows)}
    return results_file.write_results(RESULT, COMMAND, rows, **facts)


def summary(rows: Sequence[Row]) -> list[Row]:
    """The mean of each row over its seeds, with the range of each accuracy; by round where a run was tested in between."""
    found = []
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        accuracies = {name: [row["accuracy"][name] for row in mine] for name in mine[0]["accuracy"]}
        tested = zip(*(row.get("accuracy_by_round", ()) for row in mine), strict=True)
        found.append(
            {
                "what": what,
                "seeds": [row["seed"] for row in mine],
                "accuracy": {name: statistics.mean(values) for name, values in accuracies.items()},
                "accuracy_range": {name: [min(values), max(values)] for name, values in accuracies.items()},
                "accuracy_by_round": [
                    {"round": same[0]["round"], "after_switch": same[0]["after_switch"]}
                    | {name: statistics.mean(each[name] for each in same) for name in accuracies}
                    for same in tested
                ],
                **{key: statistics.mean(row[key] for row in mine) for key in ("wall_seconds", "cpu_seconds")},
            }
        )
    return found


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def table_of(rows: Sequence[Row]) -> Table:
    table = Table(title="M2FedSA on AV-Digits clean; accuracy in %, bytes in kB, range over seeds in brackets")
    for heading in ("what", "seeds", "image", "audio", FUSION, "a step", "a round up", "a round down", "seconds"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for mean in summary(rows):
        mine = [row for row in rows if row["what"] == mean["what"]]
        cells = [mean["what"], str(len(mean["seeds"]))]
        for name, value in mean["accuracy"].items():
            low, high = mean["accuracy_range"][name]
            cells.append(f"{_percent(value)} ({_percent(low)} to {_percent(high)})" if high > low else _percent(value))
        step = mine[0].get("step_bytes")
        cells.append(f"{step['all'] / 1e3:.1f}" if step else "-")
        cells += [f"{row / 1e3:.0f}" if (row := mine[0].get(f"bytes_{way}_per_round")) else "-" for way in ("up", "down")]
        table.add_row(*cells, f"{mean['wall_seconds']:.0f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", default=",".join(case.what for case in CASES), help="names, or how they begin")
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    wanted = options.rows.split(",")
    cases = [case for case in CASES if any(case.what.startswith(name) for name in wanted)]
    console = Console()
    base = SplitPlan.from_toml(PLAN)
    rows = run(cases, [int(seed) for seed in options.seeds.split(",")], base, load, console, options.fresh)
    console.print(table_of(rows))
    console.print(f"written to {write_rows(rows, base)}")


if __name__ == "__main__":
    main()
