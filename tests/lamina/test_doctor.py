"""`lamina doctor` without a model: each fault is made by real means, in folders, processes and a path of its own."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from lamina.doctor import Check, machine, packages, probes
from lamina.doctor.diagnosis import make_report
from lamina.doctor.engines import check_engines, check_libraries
from lamina.doctor.probes import EngineProbe, Shim
from lamina.doctor.requirements import parse
from lamina.errors import ConfigError
from lamina.names import ENGINES

ROOT = Path(__file__).parents[2]
ADD = {"device": "lamina engine add executorch", "coordinator": "pip install 'lamina[coordinator]'"}


def put(folder: Path, name: str, version: str, *requires: str, files: tuple[str, ...] = (), python: str = ">=3.11") -> None:
    """A distribution as pip leaves it: the metadata and the list of files, without the files."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", f"Requires-Python: {python}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {each}" for each in requires), ""]))
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in (*files, f"{info.name}/METADATA")))


def put_lamina(folder: Path) -> None:
    put(
        folder,
        "lamina",
        "9.0",
        "numpy>=1.26",
        'torch==2.13.0; extra == "export"',
        'onnx==1.23.2; extra == "export"',
        'fastapi>=0.115; extra == "coordinator"',
        'torch==2.13.0; extra == "torch"',
        'onnxruntime-training-cpu==1.19.2; (python_version < "9" and sys_platform != "none") and extra == "onnxruntime"',
        'onnxruntime==1.19.2; sys_platform == "none" and extra == "onnxruntime"',
        python="<3.13,>=3.11",
    )


def seen(folder: Path) -> tuple[list[packages.Installed], packages.Needs]:
    found = packages.installed([str(folder)])
    needs = packages.needs_of(found, None)
    assert needs is not None
    return found, needs


@pytest.mark.parametrize(
    ("text", "extra", "is_needed"),
    [
        ("numpy>=1.26", "", True),
        ("numpy>=1.26", "export", False),
        ('torch==2.13.0; extra == "export"', "export", True),
        ('torch==2.13.0; extra == "export"', "", False),
        ('torch==2.13.0; sys_platform == "none" and extra == "export"', "export", False),
        ('torch==2.13.0; python_version < "9"', "export", False),
    ],
)
def test_a_requirement_applies_to_its_extra_on_this_machine(text: str, extra: str, is_needed: bool) -> None:
    assert parse(text).applies(extra) == is_needed


def test_a_pre_release_and_a_local_build_of_a_version_will_do() -> None:
    assert parse("Some_Package>=2.0").name == "some-package"
    assert parse("a>=2.0").is_met_by("2.1rc1") and parse("a==2.13.0").is_met_by("2.13.0+cpu")
    assert not parse("a>=2.0").is_met_by("no version") and parse("a").is_met_by("no version")


@pytest.mark.parametrize("text", ["", "==1", "numpy >>1", "numpy==1 2"])
def test_a_line_that_is_no_requirement_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


def test_the_pins_are_those_of_the_metadata_and_only_those_of_this_machine(tmp_path: Path) -> None:
    put_lamina(tmp_path)

    _, needs = seen(tmp_path)

    assert needs.version == "9.0"
    assert [each.text for each in needs.by_extra["export"]] == ["torch==2.13.0", "onnx==1.23.2"]
    assert [each.text for each in needs.by_extra["onnxruntime"]] == ["onnxruntime-training-cpu==1.19.2"]


def test_the_projects_own_file_and_its_metadata_are_read_alike() -> None:
    declared = packages.needs_of([], ROOT / "pyproject.toml")

    assert declared is not None and "not installed" in declared.note
    assert {"", "export", "coordinator", "onnxruntime"} <= set(declared.by_extra)
    assert all(wanted for wanted in declared.by_extra.values())


def test_metadata_older_than_the_source_is_told(tmp_path: Path) -> None:
    put_lamina(tmp_path)

    needs = packages.needs_of(packages.installed([str(tmp_path)]), ROOT / "pyproject.toml")

    assert needs is not None and "older than" in needs.note


def test_two_packages_that_fill_onnxruntime_are_a_fault_with_the_commands_that_end_it(tmp_path: Path) -> None:
    put_lamina(tmp_path)
    put(tmp_path, "onnxruntime", "1.22.0", files=("onnxruntime/__init__.py",))
    put(tmp_path, "onnxruntime-training-cpu", "1.19.2", files=("onnxruntime/__init__.py",))
    put(tmp_path, "onnxruntime-extensions", "0.14", files=("onnxruntime_extensions/__init__.py",))

    (check,) = packages.check_clashes(*seen(tmp_path))

    assert check.state == "fault" and set(check.roles) == {"device", "exporter"}
    assert "onnxruntime and onnxruntime-training-cpu are installed together" in check.found
    assert check.remedy == (
        "pip uninstall -y onnxruntime onnxruntime-training-cpu && pip install --no-deps 'onnxruntime-training-cpu==1.19.2'"
    )


def test_one_onnxruntime_is_no_clash(tmp_path: Path) -> None:
    put_lamina(tmp_path)
    put(tmp_path, "onnxruntime-gpu", "1.22.0", files=("onnxruntime/__init__.py",))

    (check,) = packages.check_clashes(*seen(tmp_path))

    assert check.state == "ok"


def test_two_versions_of_one_package_in_a_folder_are_told(tmp_path: Path) -> None:
    put_lamina(tmp_path)
    put(tmp_path, "numpy", "1.26.4")
    put(tmp_path, "numpy", "2.4.6")

    (check,) = packages.check_clashes(*seen(tmp_path))

    assert check.state == "warning" and "1.26.4, 2.4.6" in check.found and "numpy" in check.remedy


def test_a_role_is_there_when_a_package_is_that_only_it_needs(tmp_path: Path) -> None:
    put_lamina(tmp_path)
    put(tmp_path, "torch", "2.13.0+cpu")

    assert packages.present_roles(*seen(tmp_path)) == []  # it is an engine as well

    put(tmp_path, "onnx", "1.23.2")
    assert packages.present_roles(*seen(tmp_path)) == ["exporter"]


def test_missing_and_wrong_packages_of_a_role_are_named_with_one_pip_command(tmp_path: Path) -> None:
    put_lamina(tmp_path)
    put(tmp_path, "onnx", "1.20.0")
    found, needs = seen(tmp_path)

    check = packages.check_extra("exporter packages", needs.by_extra["export"], found, ("exporter",), must=True)

    assert check.state == "fault"
    assert check.found == "onnx 1.20.0, but onnx==1.23.2 is needed; torch is missing"
    assert check.remedy == "pip install 'onnx==1.23.2' 'torch==2.13.0'"


def test_a_role_that_nobody_asked_for_may_be_absent(tmp_path: Path) -> None:
    put_lamina(tmp_path)
    found, needs = seen(tmp_path)

    check = packages.check_extra("coordinator packages", needs.by_extra["coordinator"], found, ("coordinator",), must=False)

    assert check.state == "absent" and check.remedy == "pip install 'fastapi>=0.115'"


@pytest.mark.parametrize(
    ("version", "cuda", "state", "build"),
    [
        ("2.13.0+cpu", "None", "ok", "CPU build"),
        ("2.13.0", "'12.8'", "ok", "CUDA 12.8 build"),
        ("2.12.1", "None", "fault", "CPU build"),
    ],
)
def test_torch_is_held_to_its_exact_pin_and_its_build_is_told(
    tmp_path: Path, version: str, cuda: str, state: str, build: str
) -> None:
    put_lamina(tmp_path)
    put(tmp_path, "torch", version)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = {cuda}\n")

    (check,) = packages.check_torch(*seen(tmp_path))

    assert check.state == state and build in check.found
    assert check.remedy == ("pip install 'torch==2.13.0'" if state == "fault" else "")


def test_a_torchvision_for_another_torch_is_told(tmp_path: Path) -> None:
    put_lamina(tmp_path)
    put(tmp_path, "torch", "2.13.0+cpu")
    put(tmp_path, "torchvision", "0.27.0", "torch==2.12.0", "numpy")

    check = packages.check_torch(*seen(tmp_path))[1]

    assert check.state == "warning" and "torchvision 0.27.0 is made for torch==2.12.0" in check.found
    assert "--no-deps" in check.remedy


def test_a_module_that_cannot_be_imported_is_told_with_its_first_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_vision.py").write_text(
        "try:\n    raise RuntimeError('operator torchvision::nms does not exist')\n"
        "except RuntimeError as error:\n    raise ImportError('no model') from error\n"
    )
    (tmp_path / "fine.py").write_text("import json\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    faults = probes.probe_modules(["broken_vision", "fine"])

    assert faults == {"broken_vision": "RuntimeError: operator torchvision::nms does not exist", "fine": None}
    broken, fine = check_libraries(faults, {"torchvision": "0.28.0", "torch": "2.13.0+cpu", "fine": "1"})
    assert (broken.state, fine.state) == ("warning", "ok")
    assert '--index-url "$TORCH_INDEX" torchvision==0.28.0+cpu' in broken.remedy


def test_a_module_that_kills_its_process_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadly.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    faults = probes.probe_modules(["json", "deadly", "math"])

    assert faults["json"] is None and "signal 11" in str(faults["deadly"]) and faults["math"] is not None


def test_a_process_that_does_not_end_is_ended_with_its_children() -> None:
    script = (
        "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\ntime.sleep(60)"
    )

    ended = probes.run_bounded(script, [], seconds=0.5)

    assert ended.status is None and "within 0.5 s" in ended.words(0.5)


def test_an_engine_is_looked_at_in_a_process_of_its_own() -> None:
    probe = probes.probe_engine("onnxruntime")
    pytest.importorskip("onnxruntime")

    assert probe.folder and probe.version and probe.fault is None


def test_a_damaged_executorch_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of the package of this environment, one whose libraries are empty files."""
    library = tmp_path / "executorch" / "lib"
    library.mkdir(parents=True)
    for name in (
        "libexecutorch",
        "libexecutorch_threadpool",
        "libexecutorch_kernels_optimized",
        "libexecutorch_backend_xnnpack",
    ):
        (library / f"{name}.so").touch()
    put(tmp_path, "executorch", "1.5.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LAMINA_ENGINES", str(tmp_path / "engines"))

    probe = probes.probe_engine("executorch")
    check, none = check_engines({"executorch": probe}, None)

    assert check.state == "fault" and "damaged" in check.found and check.remedy == "lamina engine add executorch"
    assert none.state == "fault" and none.roles == ("device",)


def test_a_shim_that_is_not_built_is_told_without_building_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("executorch", reason="the libraries of the package are needed", exc_type=ImportError)
    engines = tmp_path / "engines"
    monkeypatch.setenv("LAMINA_ENGINES", str(engines))

    with_compiler = probes.probe_engine("executorch")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    without = probes.probe_engine("executorch")

    first, *_ = check_engines({"executorch": with_compiler}, None)
    second, *_ = check_engines({"executorch": without}, None)
    if with_compiler.shim and with_compiler.shim.compiler:
        assert first.state == "warning" and "not built yet" in first.found
    assert second.state == "fault" and "apt install g++" in second.remedy
    assert not engines.exists()


def test_a_compiler_is_only_needed_where_a_shim_must_be_built() -> None:
    assert machine.check_compiler(None, is_needed=False).state == "absent"
    assert machine.check_compiler(None, is_needed=True).state == "fault"
    assert machine.check_compiler(["g++"], is_needed=True).state == "ok"


def test_an_engine_of_another_version_than_the_pin_is_told(tmp_path: Path) -> None:
    put_lamina(tmp_path)
    _, needs = seen(tmp_path)

    check, *_ = check_engines({"onnxruntime": EngineProbe(folder="/x", version="1.18.0")}, needs)

    assert check.state == "warning" and "onnxruntime-training-cpu==1.19.2" in check.remedy


def test_a_folder_that_cannot_be_written_is_a_fault_that_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    for folder in (tmp_path / "file" / "cache", Path("/proc/lamina/cache")):  # both are refused to root as well
        check = machine.check_folder("program cache", folder, "$LAMINA_CACHE", ("exporter",))
        assert check.state == "fault" and str(folder) in check.found and "$LAMINA_CACHE" in check.remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_a_fault(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)

    assert machine.check_folder("keys", tmp_path, "$LAMINA_KEYS", ("exporter",)).state == "fault"


def test_a_folder_that_is_not_there_is_looked_at_and_not_made(tmp_path: Path) -> None:
    check = machine.check_folder("keys", tmp_path / "a" / "b", "$LAMINA_KEYS", ("exporter",), lambda path: 50 << 30)

    assert check.state == "ok" and "not made yet" in check.found and "50.0 GiB free" in check.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free", "state"), [(1 << 20, "fault"), (500 << 20, "warning"), (2 << 30, "ok")])
def test_little_room_on_the_disk_is_told(tmp_path: Path, free: int, state: str) -> None:
    check = machine.check_folder("state", tmp_path, "--state", ("device",), lambda path: free)

    assert check.state == state and bool(check.remedy) == (state != "ok")


def test_the_program_cache_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.program").write_bytes(bytes(2048))
    (tmp_path / "a.json").write_bytes(b"{}")

    check = machine.check_cache(tmp_path)

    assert check.found == "1 programs, 2.0 KiB" and str(tmp_path) in check.remedy


def test_little_memory_is_told(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:        500000 kB\nMemFree: 1 kB\nMemAvailable:    100000 kB\n")

    check = machine.check_memory(meminfo)

    assert check.state == "warning" and "97.7 MiB available" in check.found
    assert machine.check_memory(tmp_path / "none").state == "ok"


@pytest.mark.parametrize(("version", "state"), [("3.11.7", "ok"), ("3.12.0", "ok"), ("3.13.1", "fault"), ("3.10.14", "fault")])
def test_python_is_held_to_the_metadata(version: str, state: str) -> None:
    assert machine.check_python(parse("python <3.13,>=3.11"), version).state == state


def test_a_fault_counts_for_the_roles_it_stops() -> None:
    fault = Check(name="x", state="fault", found="", remedy="mend it", roles=("coordinator",))

    there = make_report("1", "3.11", [fault], ["device", "coordinator"], ADD)
    not_there = make_report("1", "3.11", [fault], ["device"], ADD)
    asked = make_report("1", "3.11", [], ["device"], ADD, ("coordinator",))
    other = make_report("1", "3.11", [fault], ["device", "coordinator"], ADD, ("device",))

    assert [report.has_fault for report in (there, not_there, asked, other)] == [True, False, True, False]
    assert asked.roles[1].remedy == "pip install 'lamina[coordinator]'"
    assert [role.name for role in there.roles] == ["device", "coordinator"]


def test_the_program_cache_is_where_the_exporter_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from export.lowering.cache import default_cache
    from lamina.doctor.look import program_cache

    assert program_cache() == default_cache()
    monkeypatch.delenv("LAMINA_CACHE", raising=False)
    assert program_cache() == default_cache()


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """One look at this machine, with all its engines and libraries: what the command printed, and its JSON."""
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "occupied").touch()
    script = (
        "import atexit, sys, typer\nfrom lamina.cli.doctor import doctor\n"
        "heavy = 'torch onnx onnxruntime executorch fastapi sqlalchemy timm transformers matplotlib'.split()\n"
        "atexit.register(lambda: print('heavy:', [name for name in heavy if name in sys.modules]))\n"
        "app = typer.Typer()\napp.command()(doctor)\napp()"
    )
    states = ["--state", str(folder), "--state", str(folder / "occupied" / "state")]
    done = subprocess.run(
        [sys.executable, "-c", script, "--role", "device", "--json", str(folder / "report.json"), *states],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        cwd=ROOT,
        check=False,
    )
    return done, json.loads((folder / "report.json").read_text())


Looked = tuple[subprocess.CompletedProcess[str], dict[str, Any]]


def test_the_command_looks_at_this_machine_and_writes_json(looked: Looked) -> None:
    _, report = looked

    states = {check["name"]: check["state"] for check in report["checks"]}
    assert {"base packages", "memory", "C++ compiler", "program cache", "keys folder", "energy sensors"} <= set(states)
    assert states["Python"] == "ok" and states["base packages"] == "ok"
    assert {f"engine {name}" for name in ENGINES} <= set(states)
    assert report["asked"] == ["device"]
    assert all(check["remedy"] for check in report["checks"] if check["state"] in ("warning", "fault"))


def test_a_state_folder_that_cannot_be_written_ends_with_status_1(looked: Looked) -> None:
    done, report = looked

    faults = [check for check in report["checks"] if check["state"] == "fault" and "occupied" in check["name"]]
    assert [check["roles"] for check in faults] == [["device", "coordinator"]]
    assert done.returncode == 1 and faults[0]["remedy"] in done.stdout and "not as: device" in done.stdout


def test_nothing_heavy_is_imported_into_the_command_itself(looked: Looked) -> None:
    done, _ = looked

    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_the_base_install_alone_is_looked_at_and_is_no_device_yet(tmp_path: Path) -> None:
    """An environment whose Python sees the base packages and nothing else: no torch, no web framework, no engine."""
    venv.create(tmp_path / "base", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "base").glob("lib/python*/site-packages")
    put_lamina(site)
    names = ["numpy", "httpx", "httpcore", "h11", "anyio", "certifi", "idna", "sniffio", "pydantic", "pydantic_core", "typer"]
    names += ["typing_extensions", "typing_inspection", "annotated_types", "annotated_doc", "click", "rich", "pygments"]
    names += ["markdown_it", "mdurl", "shellingham", "safetensors", "numpy.libs", "packaging"]
    import numpy

    real = Path(numpy.__file__).parents[1]
    for name in names:
        for source in (real / name, real / f"{name}.py"):
            if source.exists():
                (site / source.name).symlink_to(source)
    put(site, "numpy", numpy.__version__)
    script = (
        "import typer\nfrom lamina.cli.doctor import doctor\napp = typer.Typer()\napp.command()(doctor)\n"
        "import sys\ntry:\n    app()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    (site / "here.pth").write_text(f"{ROOT}\n")
    file = tmp_path / "report.json"
    environment = {"PATH": "/nowhere", "HOME": str(tmp_path), "LAMINA_ENGINES": str(tmp_path / "engines")}

    done = subprocess.run(
        [str(tmp_path / "base" / "bin" / "python"), "-c", script, "--json", str(file)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )

    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(file.read_text())
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert states["base packages"] == "ok" and states["an engine"] == "fault" and states["C++ compiler"] == "absent"
    assert {role["name"]: role["state"] for role in report["roles"]} == {
        "device": "faulty",
        "coordinator": "absent",
        "exporter": "absent",
    }
    assert "lamina engine add executorch" in done.stdout


def test_an_unknown_role_is_refused_with_the_known_ones() -> None:
    from lamina.cli.doctor import doctor

    with pytest.raises(ConfigError, match="device, coordinator, exporter"):
        doctor(role=["phone"])


def test_options_of_the_other_use_are_refused() -> None:
    from lamina.cli.doctor import doctor

    with pytest.raises(ConfigError, match="--role"):
        doctor(model="plan.json", role=["device"])
    with pytest.raises(ConfigError, match="--engine"):
        doctor(engine=["torch"])


def test_a_shim_in_a_report_keeps_its_compiler() -> None:
    shim = Shim.from_json('{"path": "/x.so", "fault": null, "compiler": ["ccache", "g++"]}')

    assert shim.compiler == ("ccache", "g++")
