"""Adding engines to this machine, and telling which ones work: the room behind `lamina engine`.

An engine is fetched by pip and installed without its declared dependencies, which a device does not need. Of ExecuTorch's
wheel only the native libraries, their headers and licences are kept, in a folder of the user.
"""

import errno
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from edge_client.engines import executorch, executorch_runtime
from edge_client.engines.executorch_runtime import LIBRARIES, Runtime, engines_folder
from lamina.errors import ConfigError, DiskFullError, EngineMissingError
from lamina.names import EngineName

Tell = Callable[[str], None]
ONNXRUNTIME = "onnxruntime-training-cpu"
ONNXRUNTIME_VERSION = "1.19.2"
_DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "onnxruntime": (ONNXRUNTIME, "onnxruntime-training", "onnxruntime"),
    "torch": ("torch",),
}
_CHECK = """
import sys
from edge_client.engines import load_engine
from lamina.errors import LaminaError
try:
    load_engine(sys.argv[1])
except LaminaError as error:
    sys.exit(error.message)
"""


@dataclass(frozen=True)
class Found:
    """An engine as this machine has it; `fault` says why it does not load."""

    name: EngineName
    folder: Path | None
    version: str
    bytes: int
    fault: str | None


def find_engines(names: tuple[EngineName, ...], tell: Tell) -> list[Found]:
    """What is here of these engines, each loaded in a process of its own: some cannot share one, and one may crash."""
    found = []
    for name in names:
        place = _place_of(name)
        if place is None:
            found.append(Found(name, None, "", 0, f"not installed; {how_to_add(name)}"))
            continue
        tell(f"loading {name}")
        done = subprocess.run([sys.executable, "-c", _CHECK, name], capture_output=True, text=True, check=False)
        lines = done.stderr.strip().splitlines()
        fault = (lines[-1] if lines else f"the process ended with status {done.returncode}") if done.returncode else None
        found.append(Found(name, *place, folder_bytes(place[0]), fault))
    return found


def add_executorch(wheel: Path | None, tell: Tell) -> tuple[Runtime, int]:
    """ExecuTorch's native libraries in a folder of the user, with the shim built and loaded; and their bytes.

    The wheel is fetched by pip unless it is given. A failure changes nothing; repeat it to go on. Raises
    EngineMissingError, ConfigError or DiskFullError with the way out.
    """
    home = engines_folder()
    target, scratch = home / f"executorch-{executorch_runtime.VERSION}", home / ".adding"
    runtime = Runtime(target / "executorch", executorch_runtime.VERSION)
    try:
        with executorch_runtime.lock(home):
            if wheel is not None or executorch_runtime.fault_of(runtime) is not None:
                shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
                scratch.mkdir()
                _fill(scratch / "unpacked", wheel or download(f"executorch=={runtime.version}", scratch, tell), tell)
                if target.exists():
                    target.replace(scratch / "old")
                (scratch / "unpacked").replace(target)
            executorch.start(runtime, tell)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFullError(f"no space left for the engine in {home}: {error}") from error
        raise ConfigError(f"the engine cannot be put into {home}: {error}; set $LAMINA_ENGINES to another folder") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return runtime, folder_bytes(target)


def _fill(folder: Path, wheel: Path, tell: Tell) -> None:
    """Unpacks a wheel and looks whether this machine can load its libraries, before it takes the place of another."""
    tell(f"unpacking {wheel.name}")
    runtime = unpack(wheel, folder)
    fault = executorch_runtime.fault_of(runtime)
    if fault is not None:
        raise EngineMissingError(fault)
    executorch_runtime.open_libraries(runtime)


def add_onnxruntime() -> None:
    """Installs ONNX Runtime's training package into this environment with pip, without its dependencies."""
    if _version_of(("onnxruntime",)):
        raise ConfigError(
            f"the package onnxruntime is installed here, and {ONNXRUNTIME} would overwrite half of its files: "
            "pip uninstall onnxruntime, then repeat this command"
        )
    _pip("install", "--no-deps", f"{ONNXRUNTIME}=={ONNXRUNTIME_VERSION}")


def how_to_add(name: EngineName) -> str:
    return "pip install 'lamina[torch]'" if name == "torch" else f"lamina engine add {name}"


def download(requirement: str, folder: Path, tell: Tell) -> Path:
    """The wheel for this machine, fetched by pip from the index that pip is set to."""
    tell(f"fetching {requirement} with pip")
    _pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement)
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Runtime:
    """What a device needs of an ExecuTorch wheel of the tested version: `executorch/lib`, `executorch/include`, licences."""
    wanted = executorch_runtime.VERSION
    if not wheel.is_file():
        raise ConfigError(f"there is no file {wheel}")
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [PurePosixPath(name) for name in archive.namelist() if not name.endswith("/")]
            infos = {name.parts[0] for name in names if name.parts[0].endswith(".dist-info")}
            if infos != {f"executorch-{wanted}.dist-info"}:
                raise ConfigError(f"{wheel} holds {', '.join(sorted(infos)) or 'no package'}; lamina is tested with {wanted}")
            for name in filter(_is_needed, names):
                archive.extract(str(name), folder)  # compares the bytes with their checksum; never leaves `folder`
    except (zipfile.BadZipFile, EOFError) as error:
        raise ConfigError(f"{wheel} is not a whole wheel: {error}; fetch it again") from error
    return Runtime(folder / "executorch", wanted)


def _is_needed(name: PurePosixPath) -> bool:
    if name.parts[0].endswith(".dist-info"):
        return name.name == "METADATA" or "licenses" in name.parts
    return name.parts[:2] == ("executorch", "include") or (name.parts[:2] == ("executorch", "lib") and name.name in LIBRARIES)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _place_of(name: EngineName) -> tuple[Path, str] | None:
    """(folder, version) of an engine, found without importing it."""
    if name == "executorch":
        there = [executorch_runtime.packaged_runtime(), executorch_runtime.added_runtime()]
        runtimes = [runtime for runtime in there if runtime]
        whole = [runtime for runtime in runtimes if executorch_runtime.fault_of(runtime) is None]
        return next(((runtime.folder, runtime.version) for runtime in whole or runtimes), None)
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent, _version_of(_DISTRIBUTIONS[name])


def _version_of(distributions: tuple[str, ...]) -> str:
    for distribution in distributions:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return ""


def _pip(*arguments: str) -> None:
    """Runs pip of this Python; what it says goes to the terminal."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], stdout=sys.stderr, check=False)
    if done.returncode:
        raise EngineMissingError(
            f"pip {arguments[0]} ended with status {done.returncode}, its words are above: this machine may have no network, "
            f"no pip, or no such wheel for its processor and Python; for ExecuTorch, fetch the wheel elsewhere and give it "
            f"with --wheel"
        )
