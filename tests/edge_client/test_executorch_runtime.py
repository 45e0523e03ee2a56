"""Finding ExecuTorch's libraries and building the shim, and every way in which either can be missing or damaged."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest

from edge_client.engines import executorch_runtime, load_engine
from edge_client.engines.executorch_runtime import LIBRARIES, VERSION, Runtime, find_runtime, load_shim, shim_path
from lamina.errors import EngineMissingError

ROOT = Path(__file__).parents[2]
RUN = """
import sys
sys.path[:0] = sys.argv[2:]
import numpy as np
from pathlib import Path
from types import SimpleNamespace
from edge_client.engines import load_engine
x = SimpleNamespace(name="x", shape=(2, 8), dtype="float32")
program = SimpleNamespace(weights=((4, 8), (4,)), inputs=(x,), max_batch=8, precision="fp32", references=(), frozen=())
loaded = load_engine("executorch").load(Path(sys.argv[1]), program)
(out,) = loaded.run([np.ones((4, 8), np.float32), np.ones(4, np.float32), np.ones((2, 2, 8), np.float32)])
import importlib.util
print(float(out.sum()), "torch" in sys.modules, importlib.util.find_spec("torch"))
"""


@pytest.fixture(scope="session")
def shim_bytes():
    """A shim for the installed version."""
    load_engine("executorch")
    return shim_path(find_runtime()).read_bytes()


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("LAMINA_ENGINES", str(tmp_path / "engines"))
    return tmp_path / "engines"


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")


def other_version(shim):
    assert shim.count(f"={VERSION};".encode()) == 1
    return shim.replace(f"={VERSION};".encode(), b"=1.4.9;")


def write_shim(data):
    path = shim_path(find_runtime())
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path


def bare_python(folder, *packages):
    """A folder for sys.path that holds these packages of this environment and nothing else."""
    folder.mkdir()
    for name in packages:
        package = distribution(name)
        for top in {Path(file).parts[0] for file in package.files or ()} - {"..", "bin"}:
            (folder / top).symlink_to(Path(str(package.locate_file(top))))
    return folder


def run_bare(program, *folders, **environment):
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", RUN, str(program), str(ROOT), *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )


def test_the_shim_is_built_once_and_then_found(home):
    said = []
    load_shim(find_runtime(), said.append)
    assert said == [f"building the shim for ExecuTorch {VERSION} with c++, once"]
    load_shim(find_runtime(), said.append)
    assert len(said) == 1
    assert [path.name for path in (home / "shims").glob("*executorch*")] == [shim_path(find_runtime()).name]
    assert not list((home / "shims").glob(".building-*"))


def test_of_two_processes_at_once_one_builds_and_both_run(home, programs):
    program = programs.path(programs.program("executorch", "frozen", ["motion.stem"]))
    site = bare_python(home.parent / "site", "numpy", "executorch")
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: run_bare(program, site), range(3)))
    assert [run.returncode for run in done] == [0, 0, 0], done[0].stderr
    assert sum("building" in run.stderr for run in done) == 1


def test_without_torch_in_the_environment_it_runs(shim_bytes, programs, tmp_path):
    program = programs.path(programs.program("executorch", "frozen", ["motion.stem"]))
    done = run_bare(program, bare_python(tmp_path / "site", "numpy", "executorch"))
    assert done.stdout.split()[1:] == ["False", "None"], done.stderr
    assert float(done.stdout.split()[0]) == 2 * 2 * 4 * 9


def test_without_the_package_it_says_what_to_install(home, programs, tmp_path):
    program = programs.path(programs.program("executorch", "frozen", ["motion.stem"]))
    done = run_bare(program, bare_python(tmp_path / "site", "numpy"))
    assert done.stderr.splitlines()[-1] == (
        "lamina.errors.EngineMissingError: engine 'executorch' is not installed here; "
        f"install it with: lamina engine add executorch   (or: pip install --no-deps executorch=={VERSION})"
    )


def test_without_a_compiler_it_says_how_to_get_a_shim(home, no_compiler):
    with pytest.raises(EngineMissingError, match=r"there is none\. It is built by a C\+\+ compiler.* apt install g\+\+"):
        load_shim(find_runtime())


def test_a_finished_shim_needs_neither_a_compiler_nor_a_writable_folder(home, no_compiler, shim_bytes, monkeypatch):
    write_shim(shim_bytes)
    monkeypatch.setattr(executorch_runtime, "lock", None)
    assert load_shim(find_runtime()).lamina_et_open


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAMINA_ENGINES", str(tmp_path / "file" / "engines"))
    with pytest.raises(EngineMissingError, match=r"cannot be written.*set \$LAMINA_ENGINES"):
        load_shim(find_runtime())


def test_a_shim_for_another_version_is_built_anew(home, shim_bytes):
    path = write_shim(other_version(shim_bytes))
    said = []
    load_shim(find_runtime(), said.append)
    assert len(said) == 1
    assert f"={VERSION};".encode() in path.read_bytes()


def test_a_shim_for_another_version_is_refused_where_it_cannot_be_built(home, no_compiler, shim_bytes):
    write_shim(other_version(shim_bytes))
    with pytest.raises(EngineMissingError, match=rf"ExecuTorch {VERSION} needs a shim.* was built for ExecuTorch 1\.4\.9\."):
        load_shim(find_runtime())


def test_shims_of_other_versions_are_listed(home, no_compiler, shim_bytes):
    path = write_shim(b"")
    path.rename(path.with_name(path.name.replace(VERSION, "1.4.9")))
    with pytest.raises(EngineMissingError, match=r"there are only executorch-1\.4\.9-"):
        load_shim(find_runtime())


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-3000], lambda data: data[:100], lambda data: b"", lambda data: b"x" * 9]
)
def test_a_damaged_shim_is_refused_without_a_compiler_and_built_anew_with_one(home, shim_bytes, monkeypatch, damage):
    path = write_shim(damage(shim_bytes))
    with monkeypatch.context() as without:
        without.setenv("CXX", "no-such-compiler")
        with pytest.raises(EngineMissingError, match=r"\.so is damaged"):
            load_shim(find_runtime())
    load_shim(find_runtime(), lambda line: None)
    assert path.stat().st_size == len(shim_bytes)


def test_a_shim_of_another_processor_is_refused(home, shim_bytes):
    write_shim(shim_bytes[:18] + b"\xf3\x00" + shim_bytes[20:])  # the ELF header says RISC-V
    with pytest.raises(EngineMissingError, match="cannot be loaded"):
        load_shim(find_runtime())


def test_what_the_compiler_says_is_passed_on(home, monkeypatch):
    monkeypatch.setenv("CXX", "sh -c 'echo no such header >&2; exit 7'")
    with pytest.raises(EngineMissingError, match=r"cannot be built with sh .*\(status 7\): no such header"):
        load_shim(find_runtime(), lambda line: None)
    assert [path.name for path in (home / "shims").iterdir()] == ["lock"]


def linked_runtime(folder):
    """A runtime of links to the installed libraries, to be damaged."""
    runtime = Runtime(folder / "executorch", "1.5.9")
    (runtime.folder / "lib").mkdir(parents=True)
    for path in find_runtime().libraries():
        (runtime.folder / "lib" / path.name).symlink_to(path)
    return runtime


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_is_named(home, tmp_path, monkeypatch, name):
    runtime = linked_runtime(tmp_path)
    (runtime.folder / "lib" / name).unlink()
    monkeypatch.setattr(executorch_runtime, "packaged_runtime", lambda: runtime)
    with pytest.raises(EngineMissingError, match=rf"executorch 1\.5\.9 in .* has no {name}: .* lamina engine add executorch"):
        find_runtime()


def test_a_wheel_without_native_libraries_is_named(home, tmp_path, monkeypatch):
    monkeypatch.setattr(executorch_runtime, "packaged_runtime", lambda: Runtime(tmp_path, "1.4.1"))
    with pytest.raises(EngineMissingError, match=r"executorch 1\.4\.1 in .* a version before 1\.5, or a platform whose wheel"):
        find_runtime()


def test_a_cut_library_is_named_before_it_is_loaded(home, tmp_path, monkeypatch):
    runtime = linked_runtime(tmp_path)
    cut = runtime.folder / "lib" / LIBRARIES[-1]
    data = cut.read_bytes()
    cut.unlink()
    cut.write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(executorch_runtime, "packaged_runtime", lambda: runtime)
    with pytest.raises(EngineMissingError, match=rf"{LIBRARIES[-1]} of executorch 1\.5\.9 in .* is damaged"):
        find_runtime()


def test_where_the_package_is_damaged_the_added_engine_is_used(home, tmp_path, monkeypatch):
    runtime = linked_runtime(home / f"executorch-{VERSION}")
    monkeypatch.setattr(executorch_runtime, "packaged_runtime", lambda: Runtime(tmp_path, "1.5.0"))
    assert find_runtime() == Runtime(runtime.folder, VERSION)


def test_the_package_is_preferred_and_its_version_read_off(home):
    linked_runtime(home / f"executorch-{VERSION}")
    package = distribution("executorch")
    assert find_runtime() == Runtime(Path(str(package.locate_file("executorch"))), package.version)


def test_a_program_runs_on_a_shim_whose_folder_was_moved(home, programs, shim_bytes, tmp_path):
    program = programs.path(programs.program("executorch", "frozen", ["motion.stem"]))
    write_shim(shim_bytes)
    shutil.copytree(home, tmp_path / "moved")
    site = bare_python(tmp_path / "site", "numpy", "executorch")
    done = run_bare(program, site, LAMINA_ENGINES=str(tmp_path / "moved"), CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert np.isclose(float(done.stdout.split()[0]), 144)
