"""`lamina engine`, in processes of its own, with a wheel made of the installed package's files: no network."""

import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from edge_client.engines import install
from edge_client.engines.executorch_runtime import LIBRARIES, VERSION
from lamina.errors import ConfigError
from tests.edge_client.test_executorch_runtime import ROOT, bare_python, run_bare

INFO = f"executorch-{VERSION}.dist-info"
WHEEL = f"executorch-{VERSION}-py3-none-any.whl"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Libraries, headers and licence as in the real wheel, and some of what must not be taken."""
    path = tmp_path_factory.mktemp("wheel") / WHEEL
    package = distribution("executorch")
    with zipfile.ZipFile(path, "w") as archive:
        for file in package.files or ():
            is_taken = file.parts[:2] in (("executorch", "include"), ("executorch", "lib")) or "licenses" in file.parts
            if is_taken or str(file) == "executorch/exir/__init__.py":
                archive.write(
                    str(package.locate_file(file)),
                    str(file).replace(f"executorch-{package.version}.", f"executorch-{VERSION}."),
                )
        archive.writestr(f"{INFO}/METADATA", f"Metadata-Version: 2.1\nName: executorch\nVersion: {VERSION}\n")
        archive.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{INFO}/RECORD", "")
    return path


def lamina(home, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "lamina.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "200", "LAMINA_ENGINES": str(home), **environment},
        cwd=ROOT,
        check=False,
    )


@pytest.fixture(scope="session")
def added(wheel, tmp_path_factory):
    """(folder of engines, what `lamina engine add executorch --wheel` said)."""
    home = tmp_path_factory.mktemp("added") / "engines"
    done = lamina(home, "engine", "add", "executorch", "--wheel", wheel)
    assert done.returncode == 0, done.stderr
    return home, done


def test_adding_executorch_keeps_what_a_device_needs_and_says_how_large_it_is(added):
    home, done = added
    folder = home / f"executorch-{VERSION}"
    kept = {path.relative_to(folder).parts[:2] for path in folder.rglob("*") if path.is_file()}
    assert kept == {("executorch", "lib"), ("executorch", "include"), (INFO, "METADATA"), (INFO, "licenses")}
    assert sorted(path.name for path in (folder / "executorch" / "lib").iterdir()) == sorted(LIBRARIES)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 30e6
    assert f"executorch {VERSION} is ready: {size / 1e6:.1f} MB in {folder}" in done.stdout
    assert "unpacking" in done.stderr and "building the shim" in done.stderr


def test_the_added_engine_runs_without_the_package_and_without_torch(added, programs, tmp_path):
    program = programs.path(programs.program("executorch", "frozen", ["motion.stem"]))
    site = bare_python(tmp_path / "site", "numpy")
    done = run_bare(program, site, LAMINA_ENGINES=str(added[0]), CXX="no-such-compiler")
    assert done.stdout.split() == ["144.0", "False", "None"], done.stderr


def test_adding_again_fetches_nothing_and_a_damaged_engine_is_mended(added, wheel):
    home, _ = added
    again = lamina(home, "engine", "add", "executorch", PIP_NO_INDEX="1")
    assert again.returncode == 0
    assert again.stderr == ""

    library = home / f"executorch-{VERSION}" / "executorch" / "lib" / LIBRARIES[1]
    whole = library.read_bytes()
    library.write_bytes(whole[:1000])
    mended = lamina(home, "engine", "add", "executorch", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheel.parent))
    assert mended.returncode == 0, mended.stderr
    assert f"fetching executorch=={VERSION} with pip" in mended.stderr
    assert library.read_bytes() == whole
    assert not (home / ".adding").exists()


def test_without_network_it_says_so_and_leaves_nothing(tmp_path):
    done = lamina(tmp_path, "engine", "add", "executorch", PIP_NO_INDEX="1")
    assert done.returncode == 1
    assert "error [engine-missing]: pip download ended with status 1" in done.stderr
    assert "--wheel" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def broken_wheel(path, kind, wheel):
    if kind == "cut":
        path.write_bytes(wheel.read_bytes()[:100_000])
    elif kind == "text":
        path.write_text("not found")
    elif kind in ("version", "package"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("executorch-1.4.1.dist-info/METADATA" if kind == "version" else "numpy-2.dist-info/METADATA", "")
    elif kind == "flipped":
        data = bytearray(wheel.read_bytes())
        data[data.find(b"\x7fELF") + 5000] ^= 1
        path.write_bytes(data)
    elif kind == "bare":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{INFO}/METADATA", "")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("none", "there is no file"),
        ("cut", "is not a whole wheel"),
        ("text", "is not a whole wheel"),
        ("flipped", "is not a whole wheel: Bad CRC-32"),
        ("version", "holds executorch-1.4.1.dist-info; lamina is tested with"),
        ("package", "holds numpy-2.dist-info"),
        ("bare", "has no libexecutorch.so"),
    ],
)
def test_a_wheel_that_cannot_be_used_is_refused_and_leaves_nothing(tmp_path, wheel, kind, words):
    broken_wheel(tmp_path / "broken.whl", kind, wheel)
    done = lamina(tmp_path / "engines", "engine", "add", "executorch", "--wheel", tmp_path / "broken.whl")
    assert done.returncode == 1
    assert words in done.stderr
    assert [path.name for path in (tmp_path / "engines").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("tensorflow",), "cannot be added; known: executorch, onnxruntime"), (("onnxruntime", "--wheel", "x"), "--wheel is for")],
)
def test_another_engine_is_refused(tmp_path, arguments, words):
    done = lamina(tmp_path, "engine", "add", *arguments)
    assert done.returncode == 1
    assert words in done.stderr


def test_onnxruntime_is_installed_by_pip_without_its_dependencies(monkeypatch):
    asked = []
    monkeypatch.setattr(install, "_pip", lambda *arguments: asked.append(arguments))
    install.add_onnxruntime()
    assert asked == [("install", "--no-deps", "onnxruntime-training-cpu==1.19.2")]


def test_onnxruntime_is_not_put_over_the_plain_package(monkeypatch):
    monkeypatch.setattr(install, "_version_of", lambda names: "1.20.0")
    monkeypatch.setattr(install, "_pip", None)
    with pytest.raises(ConfigError, match="pip uninstall onnxruntime"):
        install.add_onnxruntime()


def test_the_list_shows_each_engine_with_its_version_size_and_state(added):
    done = lamina(added[0], "engine", "list")
    assert done.returncode == 0, done.stderr
    executorch, onnxruntime, torch = done.stdout.splitlines()
    folder = distribution("executorch").locate_file("executorch")
    assert executorch.startswith(f"executorch   {distribution('executorch').version}, ")
    assert executorch.endswith(f" MB in {folder}, loads")
    assert onnxruntime.startswith("onnxruntime  1.19.2, ") and onnxruntime.endswith(", loads")
    assert torch.startswith("torch        2.13.0") and torch.endswith(", loads")


def test_the_list_shows_why_an_engine_does_not_load(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMINA_ENGINES", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    (found,) = install.find_engines(("executorch",), lambda line: None)
    assert "It is built by a C++ compiler, and none was found" in str(found.fault)

    monkeypatch.setattr(install, "_place_of", lambda name: None)
    (found,) = install.find_engines(("executorch",), lambda line: None)
    assert (found.folder, found.fault) == (None, "not installed; lamina engine add executorch")


def test_the_pins_are_those_of_the_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["executorch"] == [f"executorch=={VERSION}"]
    assert f"executorch=={VERSION}" in extras["export-executorch"]
    assert extras["onnxruntime"][0].startswith(f"{install.ONNXRUNTIME}=={install.ONNXRUNTIME_VERSION};")
    assert f"executorch=={VERSION}" in Path(ROOT / "Makefile").read_text()
