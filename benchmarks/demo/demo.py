"""The demo: data -> plans -> bundles -> coordinator and devices as processes -> final model -> report.

Everything that takes part is the real component: the exporter, one `lamina serve` process, one `lamina join` process for
each device, HTTP between them. Only the data is dealt out by this script. The run of both modalities comes first, alone
on the machine's devices; the runs of one modality each follow with the same devices, to see what fusion brings.
"""

import os
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.data.av_digits import Level, Split, load_av_digits
from benchmarks.data.partition import dirichlet_rows, even_rows
from benchmarks.demo.plan import MODEL, blended, demo_plan
from benchmarks.demo.processes import Processes
from benchmarks.demo.report import Bounds, FinalModel, write_report
from benchmarks.methods.bounds import linear_accuracy
from benchmarks.methods.data_sets import Loaded
from export.assemble import assemble
from export.build import export_bundle
from export.cost.estimate import plan_costs
from export.models.models import build_model
from lamina.bundles.keys import VARIABLE, own_key
from lamina.bundles.manifest import EngineName, Manifest
from lamina.bundles.signing import key_text
from lamina.client import Client, read_token
from lamina.encoding.tensors import decode_file
from lamina.errors import ConfigError
from lamina.plans.plan import Plan, StrategyName
from lamina.wire import RunStatus

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class DemoSettings:
    out: Path
    strategy: StrategyName
    engines: tuple[EngineName, ...]
    devices: int
    rounds: int
    layers_per_stage: int
    seed: int
    level: Level
    beta: float
    with_baselines: bool


def run_demo(settings: DemoSettings) -> None:
    """Runs the demo and writes its report. Raises ConfigError if the output folder holds something else."""
    _claim(settings.out)
    with _own_keys((settings.out / "keys").resolve()):
        _run(settings)


def _run(settings: DemoSettings) -> None:
    started = time.monotonic()
    console = Console()
    out = settings.out
    console.print(f"[bold]AV-Digits {settings.level}[/bold], seed {settings.seed}, over {settings.devices} devices")
    train, test = load_av_digits(settings.level, settings.seed)
    files = deal_data(train, test, settings, out / "data")
    models = [blended(MODEL), *(MODEL.only(name) for name in MODEL.modalities if settings.with_baselines)]
    plans = [
        demo_plan(model, settings.strategy, settings.rounds, settings.layers_per_stage, settings.devices, settings.seed)
        for model in models
    ]
    manifest = _export(plans[0], settings, console)

    with Processes(out / "logs") as processes, ThreadPoolExecutor(1) as background:
        state = out / "coordinator"
        waits = ["--wait-seconds-min", "0.1", "--wait-seconds-max", "0.3"]
        processes.start("coordinator", ["serve", "--state", str(state), "--port", "0", *waits])
        url = processes.wait_for_file(state / "address", timeout_seconds=60)
        with Client(url, read_token(state / "admin.token")) as client:
            runs = [client.publish(_bundle(out, plans[0]), manifest).run]
            trust = ["--trust", key_text(own_key().public_key)]
            for index, file in enumerate(files):
                name, engine = f"device-{index}", settings.engines[index % len(settings.engines)]
                arguments = ["--data", str(file), "--name", name, "--engine", engine, "--state", str(out / "devices" / name)]
                processes.start(
                    name, ["join", url, *arguments, "--token-file", str(state / "enrolment.token"), *trust, "--resident"]
                )
            others = [background.submit(_export_quietly, plan, settings) for plan in plans[1:]]
            statuses = _watch(client, runs, plans, others, processes, out, console)
            client.pull_weights(statuses[0], out / "weights")

    final = _final_model(manifest, test, out)
    seconds = time.monotonic() - started
    bounds = _bounds(plans[0], train, test, settings.seed)
    report = write_report(out, settings_of(settings), manifest, statuses, final, bounds, seconds)
    console.line()
    singles = ", ".join(f"{name} alone {value:.3f}" for name, value in report["single_modality_accuracy"].items())
    console.print(f"test accuracy [bold]{report['test_accuracy']:.3f}[/bold]{f' ({singles})' if singles else ''}")
    console.print(f"a linear model with all data in one place: {report['linear_accuracy']:.3f}")
    console.print(f"final model: {out / 'model'}; report: {out / 'report.html'}; {seconds:.0f} s in all")


def deal_data(train: Split, test: Split, settings: DemoSettings, folder: Path) -> list[Path]:
    """One .npz file for each device: training rows by Dirichlet over labels, test rows evenly."""
    folder.mkdir(parents=True, exist_ok=True)
    train_rows = dirichlet_rows(train.label, settings.devices, settings.beta, settings.seed)
    test_rows = even_rows(len(test.label), settings.devices, settings.seed)
    files = []
    for index, (mine, held_out) in enumerate(zip(train_rows, test_rows, strict=True)):
        part, rest = train.take(mine), test.take(held_out)
        path = folder / f"device-{index}.npz"
        np.savez(
            path,
            train_image=part.image,
            train_audio=part.audio,
            train_label=part.label,
            test_image=rest.image,
            test_audio=rest.audio,
            test_label=rest.label,
        )
        files.append(path)
    return files


def settings_of(settings: DemoSettings) -> dict[str, object]:
    """The settings as they stand in report.json, with the command that was given."""
    return {
        "command": shlex.join(["lamina", *sys.argv[1:]]),
        "data": f"AV-Digits {settings.level}",
        "strategy": settings.strategy,
        "engines": list(settings.engines),
        "clients": settings.devices,
        "rounds": settings.rounds,
        "layers_per_stage": settings.layers_per_stage,
        "dirichlet_beta": settings.beta,
        "seed": settings.seed,
    }


def _claim(out: Path) -> None:
    """An empty or new folder, or that of an earlier demo, which is started afresh."""
    marker = out / ".lamina-demo"
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder")
    if out.exists() and any(out.iterdir()) and not marker.exists():
        raise ConfigError(f"--out {out} is not empty and not of an earlier demo; give another folder, or empty it")
    out.mkdir(parents=True, exist_ok=True)
    marker.touch()
    for part in ("coordinator", "devices", "keys", "logs", "data", "weights", "model", "bundles"):
        if (out / part).exists():
            _remove(out / part)


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            _remove(path)
        else:
            path.unlink()
    folder.rmdir()


@contextmanager
def _own_keys(folder: Path) -> Iterator[None]:
    """The demo's own key, for its processes too: it leaves the user's keys alone."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def _bundle(out: Path, plan: Plan) -> Path:
    return out / "bundles" / plan.name


def _export(plan: Plan, settings: DemoSettings, console: Console) -> Manifest:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("export", total=None)

        def tell(what: str, done: int, total: int) -> None:
            progress.update(task, description=f"export: {what}", completed=done, total=total)

        manifest = export_bundle(plan, _bundle(settings.out, plan), sorted(set(settings.engines)), on_progress=tell)
        progress.update(task, description="export")
    return manifest


def _export_quietly(plan: Plan, settings: DemoSettings) -> Manifest:
    return export_bundle(plan, _bundle(settings.out, plan), sorted(set(settings.engines)))


def _watch(
    client: Client,
    runs: list[str],
    plans: list[Plan],
    exports: list[Future[Manifest]],
    processes: Processes,
    out: Path,
    console: Console,
) -> list[RunStatus]:
    """Shows all runs until they are finished, and publishes each further bundle as soon as it is exported.

    A terminal shows a live table; anything else, such as a log file, gets a line for each closed round.
    """
    told: set[tuple[str, int, int]] = set()
    with Live(console=console, refresh_per_second=4) as live:
        while True:
            while len(runs) < len(plans) and exports[len(runs) - 1].done():
                manifest = exports[len(runs) - 1].result()
                runs.append(client.publish(_bundle(out, plans[len(runs)]), manifest).run)
            statuses = [client.run(run) for run in runs]
            live.update(_progress_table(plans, statuses))
            for status in () if console.is_terminal else statuses:
                _tell_closed_rounds(status, told, console)
            if len(runs) == len(plans) and all(status.state == "finished" for status in statuses):
                return statuses
            processes.check()
            time.sleep(POLL_SECONDS)


def _tell_closed_rounds(status: RunStatus, told: set[tuple[str, int, int]], console: Console) -> None:
    for row in status.rounds:
        key = (status.name, row.stage, row.round)
        if row.state == "closed" and key not in told:
            told.add(key)
            console.print(
                f"{status.name}: stage {row.stage}, round {row.round}: accuracy {row.test_accuracy:.3f}", highlight=False
            )


def _progress_table(plans: list[Plan], statuses: list[RunStatus]) -> Table:
    table = Table()
    for heading in ("run", "stage", "round", "accuracy", "best", "now"):
        table.add_column(heading, justify="right" if heading in ("accuracy", "best") else "left", no_wrap=heading != "now")
    for index, plan in enumerate(plans):
        if index >= len(statuses):
            table.add_row(plan.name, "", "", "", "", "exporting")
            continue
        status = statuses[index]
        accuracies = [row.test_accuracy for row in status.rounds if row.test_accuracy is not None]
        done = sum(row.state == "closed" for row in status.rounds)
        table.add_row(
            plan.name,
            f"{status.stage + 1} of {len(plan.stages)}",
            f"{done} of {sum(stage.rounds for stage in plan.stages)}",
            f"{accuracies[-1]:.3f}" if accuracies else "",
            f"{max(accuracies):.3f}" if accuracies else "",
            status.detail,
        )
    return table


def _bounds(plan: Plan, train: Split, test: Split, seed: int) -> Bounds:
    accuracy, _ = linear_accuracy(Loaded(vars(train), vars(test)), seed)
    return Bounds(linear_accuracy=accuracy, costs=plan_costs(plan, build_model(plan.model, seed)).with_heads)


def _final_model(manifest: Manifest, test: Split, out: Path) -> FinalModel:
    """The deployable files, each tried on the whole test set."""
    weights = {
        segment.name: decode_file(str(out / "weights" / f"{segment.name}.safetensors"), segment.all_tensors)
        for segment in manifest.segments
    }
    inputs = [getattr(test, modality) for modality in manifest.plan.model.modalities]
    model = assemble(manifest, weights, out / "model", inputs=inputs)
    right = {kind: float((logits.argmax(axis=-1) == test.label).mean()) for kind, (logits, *_) in model.outputs.items()}
    files = {"torch": model.safetensors, "onnx": model.onnx, "executorch": model.pte}
    return FinalModel(
        files={kind: str(path.relative_to(out)) for kind, path in files.items()},
        test_accuracy=right,
        max_difference=model.max_difference,
    )
