"""What `import lamina` gives: the main job in a few functions. The command line is thin over them.

Each loads the room that it needs when it is called; whoever only publishes needs no torch.
"""

import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.bundles.manifest import Manifest
from lamina.errors import ConfigError, LaminaError
from lamina.names import ENGINES, EngineName
from lamina.plans.plan import Plan
from lamina.wire import RunStatus

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from benchmarks.simulate.simulation import SimulationResult
    from export.assemble import AssembledModel

Source = Plan | Path | str
"""A plan, a plan file, or `package.module:function` of a function that makes the model."""
Tell = Callable[[str], None]
OnProgress = Callable[[str, int, int], None]
"""What is done, how much of it, of how much."""


def _silent(*_: object) -> None:
    """Nobody asked to be told."""


def export(
    source: Source,
    out: Path | str,
    engines: Sequence[EngineName] = ("executorch", "onnxruntime"),
    changes: Mapping[str, Any] | None = None,
    on_progress: OnProgress = _silent,
) -> Manifest:
    """Writes a signed bundle of programs and weights to the folder `out`. `changes` replace keys of a plan file.

    Raises ConfigError for a plan that cannot be, CutError for a model that cannot be cut, ExportError, ParityError.
    """
    from export.build import export_bundle

    plan, made = _resolve(source, changes)
    manifest: Manifest = export_bundle(plan, Path(out), _engines(engines), on_progress=on_progress, **made)
    return manifest


def simulate(
    source: Source,
    devices: "Sequence[Path | str | Mapping[str, ArrayLike]]",
    engine: EngineName = "onnxruntime",
    participation: float = 1.0,
    folder: Path | str | None = None,
    tell: Tell = print,
) -> "SimulationResult":
    """Trains a plan to its end in this process, to the same weights as real devices would.

    Each of `devices` is a data file as devices have it, or its arrays: `train_<modality>` and `test_<modality>` of the model's
    input shape with the examples as first axis, `train_label` and `test_label` of shape (examples,). In each round the share
    `participation` of them trains. `folder` keeps the bundle and the features; without it they are deleted. `tell` gets a line
    for each round.

    Raises what `export` raises, and DataError for data that do not fit the model.
    """
    from benchmarks.simulate.simulation import simulate as simulate_in

    plan, made = _resolve(source, None)
    with tempfile.TemporaryDirectory(prefix="lamina-") as scratch:
        place = Path(folder) if folder is not None else Path(scratch)
        files = [_data_file(device, Path(scratch) / f"device-{index}.npz") for index, device in enumerate(devices)]
        return simulate_in(
            plan, files, place, *_engines([engine]), participation, lambda row, _: tell(row.line), model=made.get("model")
        )


def publish(
    bundle: Path | str,
    url: str,
    token_file: Path | str | None = None,
    allow_unsigned: bool = False,
    on_progress: OnProgress = _silent,
    tell: Tell = _silent,
) -> str:
    """Verifies a bundle, sends what the coordinator lacks of it, and starts a run, whose name is returned.

    The token is the admin's; without a file, the environment variable LAMINA_TOKEN has it. Raises BundleError,
    SignatureError, UnreachableError, and what the coordinator refuses.
    """
    from lamina.bundles.bundle import read_bundle
    from lamina.bundles.keys import users_trust
    from lamina.client import Client, read_token

    with Client(url, read_token(_path(token_file))) as client:
        manifest = read_bundle(
            Path(bundle), lambda done, total: on_progress("verify", done, total), trust=users_trust(allow_unsigned), tell=tell
        )
        total_bytes, sent_bytes = sum(manifest.blobs.values()), 0

        def sent(count: int) -> None:
            nonlocal sent_bytes
            sent_bytes += count
            on_progress("send", sent_bytes, total_bytes)

        return client.publish(Path(bundle), manifest, sent).run


def status(url: str, run: str, token_file: Path | str | None = None) -> RunStatus:
    """What a run has done and what it waits for. Raises UnknownNameError, UnreachableError."""
    from lamina.client import Client, read_token

    with Client(url, read_token(_path(token_file))) as client:
        return client.run(run)


def pull(url: str, run: str, out: Path | str, token_file: Path | str | None = None) -> RunStatus:
    """Fetches the newest weights of a run, one `<segment>.safetensors` each, every file verified by its sha256.

    Raises UnknownNameError, UnreachableError, HashMismatchError, DiskFullError.
    """
    from lamina.client import Client, read_token

    with Client(url, read_token(_path(token_file))) as client:
        newest = client.run(run)
        client.pull_weights(newest, Path(out))
        return newest


def join(
    url: str,
    data: Path | str,
    name: str,
    state: Path | str,
    engine: EngineName = "onnxruntime",
    token_file: Path | str | None = None,
    run: str | None = None,
) -> None:
    """Takes part as a device until the run is finished, in processes of its own. Raises LaminaError if they end otherwise.

    The device's lines go to stderr. Called again after an interruption, it goes on where it was.
    """
    from edge_client.process.start import command

    options: dict[str, Any] = {
        "url": url,
        "data": str(data),
        "name": name,
        "engine": _engines([engine])[0],
        "state": str(state),
        "token_file": str(token_file) if token_file else None,
        "run": run,
        "until_finished": True,
        "is_resident": False,
        "trust": [],
        "allow_unsigned": False,
        "stall_seconds": 1800.0,
        "disk_bytes": None,
    }
    done = subprocess.run(command(options), check=False)
    if done.returncode:
        raise LaminaError(f"device {name} ended with status {done.returncode}; its lines on stderr say why")


def assemble(
    bundle: Path | str,
    weights: Path | str,
    out: Path | str,
    allow_unsigned: bool = False,
    run_factories: bool = False,
    tell: Tell = _silent,
) -> "AssembledModel":
    """Writes the trained model for PyTorch, ONNX Runtime and ExecuTorch, weights inside, compared with each other.

    `weights` is the folder that `pull` wrote. A plan whose model is made by a function of another machine's bundle is refused
    unless `run_factories`. Raises TensorFileError for a missing or damaged file, BundleError, SignatureError, ConfigError.
    """
    from export.assemble import assemble as assemble_model
    from export.assemble import attached_model
    from lamina.bundles.bundle import read_bundle
    from lamina.bundles.keys import users_trust
    from lamina.encoding.tensors import decode_file
    from lamina.errors import TensorFileError
    from lamina.plans.segments import segment_names

    manifest = read_bundle(Path(bundle), trust=users_trust(allow_unsigned), tell=tell)
    _may_call_factories(Path(bundle), manifest, run_factories)
    values = {}
    for name in segment_names(attached_model(manifest.plan)):
        path = Path(weights) / f"{name}.safetensors"
        if not path.is_file():
            raise TensorFileError(f"{path} is missing; `lamina pull` writes one file for each segment")
        values[name] = decode_file(str(path), manifest.segment(name).all_tensors)
    return assemble_model(manifest, values, Path(out))


def _resolve(source: Source, changes: Mapping[str, Any] | None) -> tuple[Plan, dict[str, Any]]:
    """The plan, and what else its export is told: the model to start from, notes and rewrites."""
    if isinstance(source, Plan):
        if changes:
            raise ConfigError("changes are for plan files; a Plan says all: make another one with plan.model_copy(update=...)")
        return source, {}
    from export.plans.resolve import resolve

    resolved = resolve(str(source), changes)
    return resolved.plan, {"model": resolved.model, "notes": resolved.notes, "rewrites": resolved.rewrites}


def _engines(names: Sequence[str]) -> list[EngineName]:
    known = [engine for name in names for engine in ENGINES if engine == name]
    if len(known) != len(names) or not names:
        unknown = next((name for name in names if name not in ENGINES), "")
        raise ConfigError(f"unknown engine {unknown!r}; known: {', '.join(ENGINES)}")
    return known


def _path(path: Path | str | None) -> Path | None:
    return None if path is None else Path(path)


def _data_file(device: "Path | str | Mapping[str, ArrayLike]", path: Path) -> Path:
    """The file of a device, written first if its arrays are in memory."""
    if isinstance(device, Path | str):
        return Path(device)
    import numpy as np

    with path.open("wb") as file:
        np.savez(file, **{name: np.asarray(values) for name, values in device.items()})  # type: ignore[arg-type]
    return path


def _may_call_factories(bundle: Path, manifest: Manifest, is_told: bool) -> None:
    """A trusted key's programs run in an engine; a factory is any function at all. Raises ConfigError for one of others."""
    from lamina.bundles.bundle import read_signature
    from lamina.bundles.keys import own_keys
    from lamina.plans.model import ModuleEncoder

    named = [encoder.factory for encoder in manifest.plan.model.encoders if isinstance(encoder, ModuleEncoder)]
    signature = read_signature(bundle)
    if not named or is_told or (signature is not None and signature.public_key in own_keys()):
        return
    raise ConfigError(
        f"{bundle} was not signed by a key of this machine, and to make its model the function {named[0]} would be called with "
        "the arguments in manifest.json; if that is what you want, pass --run-factories"
    )
