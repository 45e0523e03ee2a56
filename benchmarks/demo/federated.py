"""One run over real processes on this machine: `lamina serve`, one `lamina join` for each data file, HTTP on loopback."""

import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.demo.processes import Processes
from export.build import export_bundle
from lamina.bundles.manifest import EngineName, Manifest
from lamina.client import Client, read_token
from lamina.errors import LaminaError
from lamina.plans.plan import Plan
from lamina.wire import RunStatus

_POLL_SECONDS = 0.5


def federated_run(
    plan: Plan,
    files: Sequence[Path],
    engines: Sequence[EngineName],
    folder: Path,
    join_options: Sequence[str] = (),
    timeout_seconds: float = 3600,
    weights: Path | None = None,
) -> tuple[Manifest, RunStatus]:
    """Exports the plan and trains it to the end. The folder `weights` gets the final ones, as `lamina pull` writes them.

    Raises LaminaError if a process ends early or time is up.
    """
    bundle = folder / "bundle"
    manifest = export_bundle(plan, bundle, tuple(dict.fromkeys(engines)))
    with Processes(folder / "logs") as processes:
        state = folder / "coordinator"
        waits = ["--wait-seconds-min", "0.05", "--wait-seconds-max", "0.15"]
        processes.start("coordinator", ["serve", "--state", str(state), "--port", "0", *waits])
        url = processes.wait_for_file(state / "address", timeout_seconds=60)
        token = ["--token-file", str(state / "enrolment.token")]
        with Client(url, read_token(state / "admin.token")) as client:
            run = client.publish(bundle, manifest).run
            for index, (file, engine) in enumerate(zip(files, engines, strict=True)):
                name = f"device-{index}"
                arguments = ["--data", str(file), "--name", name, "--engine", engine, "--state", str(folder / name)]
                processes.start(name, ["join", url, *arguments, *token, *join_options])
            end = time.monotonic() + timeout_seconds
            while (status := client.run(run)).state != "finished":
                processes.check()
                if time.monotonic() > end:
                    raise LaminaError(f"{plan.name} was not finished within {timeout_seconds:.0f} s; logs: {folder / 'logs'}")
                time.sleep(_POLL_SECONDS)
            if weights is not None:
                client.pull_weights(status, weights)
            return manifest, status
