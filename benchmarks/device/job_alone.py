"""One job of a device, done by the device's own training process: what it really takes, without a coordinator.

The bundle stands for the downloads. The process is the one that `lamina join` starts; its peak is the kernel's.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.job import Job
from edge_client.process.outcome import JOB, OUTCOME
from edge_client.rows.local_data import LocalData
from edge_client.talk.prepare import prepare_job
from export.build import export_bundle
from lamina.bundles.bundle import blob_path, bundle_digest
from lamina.bundles.manifest import EngineName, Manifest
from lamina.errors import LaminaError
from lamina.files import write_durably
from lamina.plans.model import ModelDescription
from lamina.plans.plan import Plan
from lamina.wire import Assignment, CheckIn


def random_examples(model: ModelDescription, count: int, path: Path, seed: int = 0) -> Path:
    """An .npz of legal random examples, all of them for training."""
    random = np.random.default_rng(seed)
    arrays: dict[str, Any] = {}
    for encoder in model.encoders:
        shape = (count, *encoder.input.shape)
        if encoder.input.kind == "text_tokens":
            arrays[f"train_{encoder.modality}"] = random.integers(0, encoder.input.vocabulary, shape)
        else:
            arrays[f"train_{encoder.modality}"] = random.standard_normal(shape, np.float32)
    if model.objective.kind == "supervised":
        arrays["train_label"] = random.integers(0, model.objective.classes, count)
    np.savez(path, **arrays)
    return path


def client_job(manifest: Manifest, bundle: Path, engine: EngineName, stage: int, data: Path, state: Path) -> Job:
    """The job of training one round of a stage from the bundle's initial weights, as a device would have it."""
    stage_segments = (*manifest.plan.stages[stage].active, *manifest.plan.stages[stage].frozen)
    work = Assignment(
        phase="train",
        run="bench",
        manifest=bundle_digest(bundle),
        stage=stage,
        round=0,
        weights={name: manifest.initial_weights[name] for name in stage_segments},
        lease_seconds=3600.0,
        upload_encoding=manifest.plan.training.upload_encoding,
    )
    local = LocalData(data, state / "data")
    facts = CheckIn(engine=engine, modalities=local.modalities, train_examples=local.train_examples, test_examples=0)

    def fetch(digest: str) -> Path:
        return blob_path(bundle, digest)

    job = prepare_job(work, manifest, local, fetch, state, "bench", engine, facts, "http://127.0.0.1", None)
    return replace(job, heartbeat=None)


def run_job(job: Job) -> dict[str, Any]:
    """The outcome of a job, done by a fresh training process with one thread. Raises LaminaError if it did not end well."""
    folder = Path(job.work_folder)
    write_durably(folder / JOB, job.to_json())
    (folder / OUTCOME).unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "edge_client.train.trainer", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not (folder / OUTCOME).is_file():
        raise LaminaError(f"the training process ended with status {done.returncode}: {done.stderr[-500:]}")
    outcome: dict[str, Any] = json.loads((folder / OUTCOME).read_bytes())
    if outcome["kind"] == "error":
        raise LaminaError(outcome["message"])
    return outcome


def base_peaks(engine: EngineName) -> dict[str, int]:
    """Peak bytes of a device's processes before any model: supervisor, talk, train (with the engine loaded)."""
    peak = "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    codes = {
        "supervisor_bytes": (["-I", "-S"], f"import fcntl, json, signal\n{peak}"),
        "talk_bytes": (
            ["-P"],
            f"import edge_client.talk.device as d\nd.Transport('http://127.0.0.1:9')\nd.Manifest.model_json_schema()\n{peak}",
        ),
        "train_bytes": (
            ["-P"],
            f"import edge_client.train.trainer\nfrom edge_client.engines import load_engine\nload_engine({engine!r})\n{peak}",
        ),
    }
    found = {}
    for name, (options, code) in codes.items():
        done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode:
            raise LaminaError(f"the {name.removesuffix('_bytes')} process does not start: {done.stderr[-500:]}")
        found[name] = int(done.stdout) * 1024
    return found


def measure_stage(plan: Plan, stage: int, engine: EngineName, folder: Path, cache: Path | None = None) -> dict[str, int]:
    """Measured peaks of the training process in one stage of a plan: `fill_bytes` makes the features and trains,
    `train_bytes` trains from stored ones. Two batches of random examples."""
    alone = plan.model_copy(update={"stages": (plan.stages[stage].model_copy(update={"index": 0, "rounds": 1}),)})
    manifest = export_bundle(alone, folder / "bundle", (engine,), cache=cache)
    data = random_examples(plan.model, 2 * plan.training.batch_size, folder / "data.npz")
    peaks = {}
    for name in ("fill_bytes", "train_bytes"):
        outcome = run_job(client_job(manifest, folder / "bundle", engine, 0, data, folder / "state"))
        peaks[name] = int(outcome["peak_bytes"])
    return peaks
