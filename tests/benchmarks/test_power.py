"""RAPL: which counters are read, and what happens when they start again or may not be read."""

import time
from pathlib import Path

import pytest

from benchmarks.device.power import Rapl, Sensors, Zone, find_zones


def make_zone(folder: Path, name: str, label: str, microjoules: int = 0, most: int = 1000) -> Path:
    zone = folder / name
    zone.mkdir(parents=True)
    (zone / "name").write_text(label + "\n")
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    (zone / "max_energy_range_uj").write_text(f"{most}\n")
    return zone


def test_packages_and_memory_are_counted_once(tmp_path: Path) -> None:
    for name, label in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram")):
        make_zone(tmp_path, name, label)
    make_zone(tmp_path, "intel-rapl:1", "psys")
    make_zone(tmp_path, "intel-rapl-mmio:0", "package-0")

    zones, problem = find_zones(tmp_path)

    assert [zone.name for zone in zones] == ["package-0", "dram"]
    assert problem == ""


def test_a_counter_that_starts_again_loses_nothing(tmp_path: Path) -> None:
    counter = make_zone(tmp_path, "intel-rapl:0", "package-0", 900_000, 1_000_000) / "energy_uj"
    with Rapl([Zone("package-0", counter, 1_000_000)], seconds=0.01) as rapl:
        begin = time.monotonic()
        time.sleep(0.03)
        counter.write_text("100000\n")
        time.sleep(0.03)

        assert rapl.joules(begin, time.monotonic()) == pytest.approx(0.2)
        assert rapl.source == "RAPL package-0"


def test_without_sensors_there_is_a_reason(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TEGRASTATS", str(tmp_path / "absent"))
    with Sensors(powercap=tmp_path) as sensors:
        assert sensors.energy(0.0, 1.0).reason == "this machine has neither tegrastats nor RAPL counters (/sys/class/powercap)"
        assert sensors.window_seconds == 0.0


def test_counters_for_root_only_are_named(tmp_path: Path, monkeypatch) -> None:
    zone = make_zone(tmp_path, "intel-rapl:0", "package-0")
    read_text = Path.read_text

    def refuse(path: Path, *arguments: object) -> str:
        if path == zone / "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read_text(path, *arguments)

    monkeypatch.setattr(Path, "read_text", refuse)

    zones, problem = find_zones(tmp_path)

    assert zones == []
    assert "root only" in problem and "sudo" in problem
