"""Finds ExecuTorch's native libraries and builds the shim that makes them callable from Python: no torch, no bindings.

The libraries come from the `executorch` package of this environment, which is looked at but never imported, or from the
folder that `lamina engine add executorch` filled. The shim (`executorch_shim.cpp`) is compiled once for each version of
ExecuTorch, by the C++ compiler of this machine, and kept.

Raises EngineMissingError with the way out for everything that can be missing.
"""

import ctypes
import fcntl
import importlib.util
import os
import platform
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_client.progress import Say, say
from lamina.errors import EngineMissingError

VERSION = "1.5.1"  # the one that is tested
# In this order each one finds the earlier ones that it needs. All other libraries of the wheel stay out of the process.
LIBRARIES = (
    "libexecutorch.so",
    "libexecutorch_threadpool.so",
    "libexecutorch_kernels_optimized.so",
    "libexecutorch_backend_xnnpack.so",
)
SOURCE = Path(__file__).with_name("executorch_shim.cpp")
_HOW_TO_INSTALL = f"install it with: lamina engine add executorch   (or: pip install --no-deps executorch=={VERSION})"


@dataclass(frozen=True)
class Runtime:
    """An `executorch` folder with `lib/` and `include/`, as in the wheel."""

    folder: Path
    version: str

    def libraries(self) -> list[Path]:
        return [self.folder / "lib" / name for name in LIBRARIES]


def engines_folder() -> Path:
    """Where engines and shims of this user are kept: $LAMINA_ENGINES, else ~/.cache/lamina/engines."""
    chosen = os.environ.get("LAMINA_ENGINES")
    return Path(chosen) if chosen else Path.home() / ".cache" / "lamina" / "engines"


def added_runtime() -> Runtime | None:
    """What `lamina engine add executorch` put here, of the tested version or else of the latest name."""
    found = sorted(engines_folder().glob("executorch-*/executorch"), key=lambda path: (VERSION in path.parent.name, path))
    return Runtime(found[-1], found[-1].parent.name.removeprefix("executorch-")) if found else None


def packaged_runtime() -> Runtime | None:
    """The `executorch` package of this environment, found without importing it: its Python code needs torch."""
    spec = importlib.util.find_spec("executorch")
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in map(Path, places):
        # The name of this folder has the version; importlib.metadata would take 5 MiB to say the same.
        for info in place.parent.glob("executorch-*.dist-info"):
            return Runtime(place, info.name.removesuffix(".dist-info").removeprefix("executorch-"))
    return None


def find_runtime() -> Runtime:
    """The package of the environment, or else what `lamina engine add` put here; both are checked to be whole."""
    candidates = [runtime for runtime in (packaged_runtime(), added_runtime()) if runtime]
    if not candidates:
        raise EngineMissingError(f"engine 'executorch' is not installed here; {_HOW_TO_INSTALL}")
    faults = []
    for runtime in candidates:
        fault = fault_of(runtime)
        if fault is None:
            return runtime
        faults.append(fault)
    raise EngineMissingError("; ".join(faults) + f"; {_HOW_TO_INSTALL}")


def load_shim(runtime: Runtime, tell: Say = say) -> ctypes.CDLL:
    """The shim for this runtime, compiled if it is not there yet, with the runtime's libraries in the process."""
    open_libraries(runtime)
    path = shim_path(runtime)
    fault = shim_fault(path, runtime)
    if fault is not None:
        with lock(path.parent):  # of two processes that start at once, one compiles
            fault = shim_fault(path, runtime)
            if fault is not None:
                _build(runtime, path, fault, tell)
                fault = shim_fault(path, runtime)
    if fault is None:
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            fault = f"{path} cannot be loaded ({error})"
    raise EngineMissingError(f"the shim for ExecuTorch {runtime.version} does not work: {fault}; delete it, and check $CXX")


def open_libraries(runtime: Runtime) -> None:
    """Loads them into this process, by path and before the shim, which then finds them by name wherever they lie."""
    for path in runtime.libraries():
        try:
            ctypes.CDLL(str(path))
        except OSError as error:
            raise EngineMissingError(f"{path.name} of ExecuTorch cannot be loaded on this machine: {error}") from error


def shim_path(runtime: Runtime) -> Path:
    """One file for each source, ExecuTorch version and processor."""
    source = zlib.crc32(SOURCE.read_bytes())  # hashlib would load OpenSSL, 3.6 MiB, and nobody attacks here
    return engines_folder() / "shims" / f"executorch-{runtime.version}-{platform.machine()}-{source:08x}.so"


def find_compiler() -> list[str] | None:
    """$CXX with its arguments, or the first of c++, g++ and clang++; None where there is none."""
    import shutil

    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    return None


def compile_command(compiler: list[str], runtime: Runtime, output: Path) -> list[str]:
    include = runtime.folder / "include"
    return [
        *compiler,
        *("-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-o", str(output), str(SOURCE)),
        *(f"-I{include}", f"-I{include / 'executorch/runtime/core/portable_type/c10'}"),
        *("-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_USE_THREADPOOL"),
        f'-DLAMINA_EXECUTORCH_VERSION="{runtime.version}"',
        "-Wl,--no-as-needed",  # kernels and backends register themselves when they are loaded; nothing calls them by name
        *map(str, runtime.libraries()),
    ]


def fault_of(runtime: Runtime) -> str | None:
    """Why its libraries cannot be used; None if they are all there and whole."""
    lacking = [path.name for path in runtime.libraries() if not path.is_file()]
    if lacking:
        return (
            f"executorch {runtime.version} in {runtime.folder} has no {', '.join(lacking)}: a damaged installation, "
            f"a version before 1.5, or a platform whose wheel has no native libraries"
        )
    broken = [path.name for path in runtime.libraries() if not _is_whole(path)]
    return f"{', '.join(broken)} of executorch {runtime.version} in {runtime.folder} is damaged" if broken else None


def _is_whole(path: Path) -> bool:
    """Whether an ELF file reaches to the end of its section table, which comes last. A cut one would kill the process."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        return False
    table, size, count = (int.from_bytes(head[at:end], "little") for at, end in ((40, 48), (58, 60), (60, 62)))
    return path.stat().st_size >= table + size * count


def shim_fault(path: Path, runtime: Runtime) -> str | None:
    """What is wrong with a shim, without loading it; None if it is whole and made for this version."""
    if not path.is_file():
        return "there is none"
    if not _is_whole(path):
        return f"{path} is damaged"
    _, found, rest = path.read_bytes().partition(b"lamina_et_version=")
    version = rest.partition(b";")[0].decode(errors="replace") if found else "no version"
    return None if version == runtime.version else f"{path} was built for ExecuTorch {version}"


def _advice_without_compiler(runtime: Runtime, path: Path, fault: str) -> str:
    others = sorted(other.name for other in path.parent.glob(f"executorch-*-{platform.machine()}-*.so") if other != path)
    return (
        f"ExecuTorch {runtime.version} needs a shim on this machine: {fault}"
        + (f"; there are only {', '.join(others)}" if others else "")
        + ". It is built by a C++ compiler, and none was found: install one (Debian: apt install g++) or set $CXX, and run "
        f"the same command again; or build it on a machine of the same kind with `lamina engine add executorch` and copy "
        f"its {path.parent} to this one"
    )


def _build(runtime: Runtime, path: Path, fault: str, tell: Say) -> None:
    import subprocess  # here, as most processes find the shim ready and need not carry these modules
    import tempfile

    compiler = find_compiler()
    if compiler is None:
        raise EngineMissingError(_advice_without_compiler(runtime, path, fault))
    tell(f"building the shim for ExecuTorch {runtime.version} with {compiler[0]}, once")
    handle, name = tempfile.mkstemp(prefix=".building-", suffix=".so", dir=path.parent)
    os.close(handle)
    built = Path(name)
    try:
        done = subprocess.run(compile_command(compiler, runtime, built), capture_output=True, text=True, check=False)
        if done.returncode:
            raise EngineMissingError(
                f"the shim for ExecuTorch {runtime.version} cannot be built with {shlex.join(compiler)} "
                f"(status {done.returncode}): {done.stderr.strip()[-500:] or 'it said nothing'}"
            )
        built.replace(path)
    finally:
        built.unlink(missing_ok=True)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder of engines, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise EngineMissingError(
            f"the folder for engines cannot be written: {error}; set $LAMINA_ENGINES to another"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
