"""An arm64 device in a folder: the Python of Debian bookworm, wheels, an emulator, and a cross compiler for the shim.

Debian's packages are fetched by apt with a state of its own, which checks their signatures, and only unpacked: nothing is
installed, the system's settings stay as they are, and root is not needed. Wheels are held to the hashes in requirements.txt.
Afterwards `.cache/arm64/python` is the Python of the device.
"""

import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".cache" / "arm64"
PYTHON = FOLDER / "python"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
CPU = "cortex-a53"  # the cores of a Raspberry Pi 3 and of the slow half of many phones
DEVICE, TOOLS, SITE = FOLDER / "device", FOLDER / "tools", FOLDER / "site"
SOURCES = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))


class NotPossibleError(Exception):
    """The tools cannot be had on this machine."""


def prepare(seconds_left: Callable[[], float]) -> None:
    """Fetches what is missing. Raises NotPossibleError with the reason if that fails."""
    version = str(zlib.crc32(Path(__file__).read_bytes() + REQUIREMENTS.read_bytes()))
    ready = FOLDER / "ready"
    if not (ready.is_file() and ready.read_text() == version):
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.mkdir(parents=True)
        (FOLDER / "no-packages").touch()
        _say("fetching Debian's packages and the wheels for arm64, 180 MB, once")
        _unpack("arm64", ["python3.11-minimal", "libpython3.11-stdlib", "libstdc++6"], "no-packages", DEVICE, seconds_left)
        _unpack("amd64", ["qemu-user-static", "g++-aarch64-linux-gnu"], "/var/lib/dpkg/status", TOOLS, seconds_left)
        _install_wheels(seconds_left)
        _write_commands()
    machine = _run([PYTHON, "-c", "import platform; print(platform.machine())"], seconds_left).stdout.strip()
    if machine != "aarch64":
        raise NotPossibleError(f"the emulated Python says that it runs on {machine!r}")
    ready.write_text(version)


def _unpack(architecture: str, packages: list[str], installed: str, target: Path, seconds_left: Callable[[], float]) -> None:
    """Unpacks packages with all that they need beside those that `installed` lists."""
    sources = next((path for path in SOURCES if path.is_file()), None)
    if sources is None:
        raise NotPossibleError(f"apt has no sources in {' or '.join(map(str, SOURCES))}")
    state = FOLDER / f"apt-{architecture}"
    archives = state / "cache" / "archives"
    for folder in (state / "lists" / "partial", archives / "partial"):
        folder.mkdir(parents=True)
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures::": architecture,
        "APT::Install-Recommends": "0",
        "APT::Sandbox::User": "root",
        "Acquire::http::Timeout": "30",
        "Acquire::Retries": "2",
        "Debug::NoLocking": "1",
        "Dir::Cache": state / "cache",
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State": state,
        "Dir::State::lists": state / "lists",
        "Dir::State::status": FOLDER / installed,
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    warnings = _run([*apt, "update"], seconds_left).stderr  # a source that does not answer may be one that is not needed
    try:
        _run([*apt, "--yes", "--download-only", "install", *packages], seconds_left)
    except NotPossibleError as error:
        raise NotPossibleError(f"{warnings[:400]} {error}") from error
    for archive in sorted(archives.glob("*.deb")):
        _run(["dpkg-deb", "-x", archive, target], seconds_left)
    shutil.rmtree(state)


def _install_wheels(seconds_left: Callable[[], float]) -> None:
    platforms = [f"--platform={name}_aarch64" for name in ("manylinux_2_28", "manylinux_2_27", "manylinux2014")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    _run([*pip, *platforms, "--python-version=3.11", f"--target={SITE}", f"--requirement={REQUIREMENTS}"], seconds_left)


def _write_commands() -> None:
    """The device's Python, and the C++ compiler that it finds: that one runs on this machine, as the kernel sees to it."""
    compiler = FOLDER / "c++"
    _write_command(
        compiler,
        {"LD_LIBRARY_PATH": TOOLS / "usr/lib/x86_64-linux-gnu"},
        [_tool("aarch64-linux-gnu-g++"), *([f"--sysroot={TOOLS}"] if (TOOLS / "usr/aarch64-linux-gnu").is_dir() else [])],
    )
    _write_command(
        PYTHON,
        {"PYTHONPATH": f"{SITE}:{ROOT}", "CXX": compiler, "LAMINA_ENGINES": FOLDER / "engines"},
        [_tool("qemu-aarch64-static"), "-cpu", CPU, "-L", DEVICE, DEVICE / "usr/bin/python3.11"],
    )


def _write_command(path: Path, variables: dict[str, object], command: list[object]) -> None:
    exports = "".join(f"export {name}='{value}'\n" for name, value in variables.items())
    path.write_text(f'#!/bin/sh\n{exports}exec {" ".join(repr(str(word)) for word in command)} "$@"\n')
    path.chmod(0o755)


def _tool(name: str) -> str:
    """An unpacked program, or the system's own where its package was installed already."""
    unpacked = TOOLS / "usr/bin" / name
    found = str(unpacked) if unpacked.exists() else shutil.which(name)
    if found is None:
        raise NotPossibleError(f"{name} is in none of the unpacked packages")
    return found


def _run(command: list[object], seconds_left: Callable[[], float]) -> subprocess.CompletedProcess[str]:
    words = list(map(str, command))
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=max(1.0, seconds_left()),
            env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
        )
    except OSError as error:
        raise NotPossibleError(f"{words[0]} cannot be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise NotPossibleError(f"{words[0]} was not finished in time") from error
    if done.returncode:
        last_words = (done.stderr.strip() or done.stdout.strip() or "it said nothing")[-400:]
        raise NotPossibleError(f"{Path(words[0]).name} ended with status {done.returncode}: {last_words}")
    return done


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
