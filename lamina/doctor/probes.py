"""Loading what is heavy, each in a fresh process that is ended when it takes too long: a fault there is a finding here."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

from lamina.names import EngineName
from lamina.record import Record

SECONDS = 60.0
"""A module that takes longer on a small machine is not the fault that this looks for, but it is told."""

_ENGINE = """
import json, sys
from edge_client.engines import executorch_runtime as runtimes
from edge_client.engines.install import find_engines, how_to_add
name, shim = sys.argv[1], None
if name == "executorch":
    there = [each for each in (runtimes.packaged_runtime(), runtimes.added_runtime()) if each]
    whole = [each for each in there if runtimes.fault_of(each) is None]
    if whole:
        path = runtimes.shim_path(whole[0])
        shim = {"path": str(path), "fault": runtimes.shim_fault(path, whole[0]), "compiler": runtimes.find_compiler()}
        if shim["fault"]:
            # Loading would compile it now, which takes longer than a look.
            print(json.dumps({"folder": str(whole[0].folder), "version": whole[0].version, "shim": shim}))
            sys.exit()
found = find_engines((name,), lambda line: None)[0]
print(json.dumps({"folder": found.folder and str(found.folder), "version": found.version, "fault": found.fault,
                  "shim": shim, "how_to_add": how_to_add(name)}))
"""

_MODULES = """
import importlib, sys
for name in sys.argv[1:]:
    module, _, attribute = name.partition(":")
    try:
        loaded = importlib.import_module(module)
        if attribute:
            getattr(loaded, attribute)
        print("ok", module, flush=True)
    except BaseException as error:
        while error.__cause__ or error.__context__:
            error = error.__cause__ or error.__context__
        print("no", module, f"{type(error).__name__}: {error}".splitlines()[0], flush=True)
"""


class Shim(Record):
    """The compiled file that makes ExecuTorch callable; `fault` is None where it is whole and of the right version."""

    path: str
    fault: str | None
    compiler: tuple[str, ...] | None


class EngineProbe(Record):
    """What a fresh process found of an engine; `folder` is None where it is not installed."""

    folder: str | None
    version: str = ""
    fault: str | None = None
    shim: Shim | None = None
    how_to_add: str = ""


@dataclass(frozen=True)
class Ended:
    """How a child ended; `status` is None if it was stopped for taking too long."""

    status: int | None
    out: str
    err: str

    def words(self, seconds: float) -> str:
        if self.status is None:
            return f"did not end within {seconds:g} s"
        last = (self.err.strip().splitlines() or ["it said nothing"])[-1]
        if self.status < 0:
            return f"the process was killed by signal {-self.status} ({signal.strsignal(-self.status)}): {last}"
        return f"the process ended with status {self.status}: {last}"


def run_bounded(script: str, arguments: list[str], seconds: float = SECONDS) -> Ended:
    """Runs a Python script in a fresh process; with everything that it started, it is killed after `seconds`."""
    own = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=own,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
        return Ended(process.returncode, out, err)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        return Ended(None, out, err)


def probe_engine(name: EngineName, seconds: float = SECONDS) -> EngineProbe:
    """Looks for an engine and loads it in a fresh process. Whatever happens there is in `fault`."""
    ended = run_bounded(_ENGINE, [name], seconds)
    lines = ended.out.strip().splitlines()
    if ended.status != 0 or not lines:
        return EngineProbe(folder="", fault=ended.words(seconds))
    return EngineProbe.from_json(lines[-1], f"what the look at {name} printed")


def probe_modules(names: list[str], seconds: float = SECONDS) -> dict[str, str | None]:
    """Module -> None if it can be imported, else why not. `module:name` also reads a name of it. One process for all."""
    if not names:
        return {}
    ended = run_bounded(_MODULES, names, seconds)
    found: dict[str, str | None] = {}
    for line in ended.out.splitlines():
        word, _, rest = line.partition(" ")
        module, _, fault = rest.partition(" ")
        if word in ("ok", "no"):
            found[module] = None if word == "ok" else fault
    for name in names:
        found.setdefault(name.partition(":")[0], ended.words(seconds))
    return found
