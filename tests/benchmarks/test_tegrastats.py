"""tegrastats: recorded lines of every generation, and a program that does not do what it should.

The lines are as their owners published them:

    ORIN_NANO   henrygd/beszel, issue #286 and internal/agent/gpu_test.go
    AGX_ORIN    GDWR/jetson_exporter, issue #14
    AGX_XAVIER  martinkersner/gtop, pull request #7
    TX2         gustavz/realtime_object_detection, issue #24
    NANO        DataDog/datadog-agent, test of the check for Jetsons (pkg/collector/corechecks/nvidia)
    TX1         hordiales/jetson-tx1-dev, SCRIPTS.md
    AGX_THOR    its rails as the board prints them; the rest of the line is cut
"""

import os
import stat
import time
from pathlib import Path

import pytest

from benchmarks.device import tegrastats
from benchmarks.device.power import Sensors, integrate
from benchmarks.device.tegrastats import Rail, Tegrastats, parse_line

ORIN_NANO = (
    "11-15-2024 08:38:09 RAM 6185/7620MB (lfb 8x2MB) SWAP 851/3810MB (cached 1MB) "
    "CPU [15%@729,11%@729,14%@729,13%@729,11%@729,8%@729] EMC_FREQ 43%@2133 GR3D_FREQ 63%@[621] NVDEC off NVJPG off "
    "NVJPG1 off VIC off OFA off APE 200 cpu@53.968C soc2@52.437C soc0@50.75C gpu@53.343C tj@53.968C soc1@51.656C "
    "VDD_IN 12479mW/12479mW VDD_CPU_GPU_CV 4667mW/4667mW VDD_SOC 2817mW/2817mW"
)
AGX_ORIN = (
    "04-11-2025 10:36:27 RAM 4321/62801MB (lfb 1759x4MB) SWAP 19/31400MB (cached 0MB) CPU [0%@729,0%@729,0%@729,0%@729,"
    "0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729] EMC_FREQ 0%@2133 GR3D_FREQ 0%@[0,0] VIC_FREQ 729 APE 174 "
    "CV0@-256C CPU@44.562C Tboard@32C SOC2@40.093C Tdiode@33C SOC0@41.093C CV1@-256C GPU@-256C tj@44.343C SOC1@41.25C "
    "CV2@-256C VDD_GPU_SOC 2340mW/2340mW VDD_CPU_CV 390mW/390mW VIN_SYS_5V0 4025mW/4025mW NC 0mW/0mW "
    "VDDQ_VDD2_1V8AO 301mW/301mW NC 0mW/0mW"
)
AGX_XAVIER = (
    "RAM 14700/15692MB (lfb 3x2MB) SWAP 898/8192MB (cached 23MB) CPU [0%@1190,0%@1190,0%@1190,0%@1190,0%@1190,0%@1190,"
    "0%@1190,0%@1190] EMC_FREQ 0% GR3D_FREQ 0% AO@30C GPU@30.5C Tboard@31C Tdiode@32C AUX@30.5C CPU@31.5C thermal@30.8C "
    "PMIC@100C GPU 463/463 CPU 618/618 SOC 2936/2936 CV 0/0 VDDRQ 309/309 SYS5V 3306/3306"
)
TX2 = (
    "RAM 1685/7854MB (lfb 1044x4MB) SWAP 278/8192MB (cached 23MB) CPU [5%@345,0%@345,0%@345,7%@345,3%@347,0%@345] "
    "EMC_FREQ 16%@102 GR3D_FREQ 36%@140 APE 150 MTS fg 0% bg 0% BCPU@41C MCPU@41C GPU@39C PLL@41C Tboard@37C "
    "Tdiode@37.25C PMIC@100C thermal@39.9C VDD_IN 1776/1805 VDD_CPU 231/231 VDD_GPU 154/154 VDD_SOC 386/385"
)
NANO = (
    "RAM 613/3964MB (lfb 634x4MB) SWAP 0/1982MB (cached 0MB) CPU [2%@102,1%@102,0%@102,0%@102] EMC_FREQ 0% GR3D_FREQ 0% "
    "PLL@39C CPU@40.5C PMIC@100C GPU@41C AO@46C thermal@41C POM_5V_IN 900/943 POM_5V_GPU 0/0 POM_5V_CPU 123/123"
)
TX1 = "RAM 3607/3983MB (lfb 47x4MB) SWAP 873/8192MB (cached 281MB) cpu [17%,11%,65%,off]@1734 EMC 1%@1600 APE 25 GR3D 39%@76"
AGX_THOR = (
    "RAM 5000/125772MB (lfb 8x4MB) GR3D_FREQ 0% VDD_GPU 2350mW/2350mW VDD_CPU_SOC_MSS 6510mW/6510mW "
    "VIN_SYS_5V0 6520mW/6520mW VIN 23000mW/23000mW"
)
MIB = 2**20


def test_orin_nano_reports_the_whole_module_on_vdd_in() -> None:
    sample = parse_line(ORIN_NANO)

    assert sample is not None
    assert (sample.ram_used_bytes, sample.ram_total_bytes) == (6185 * MIB, 7620 * MIB)
    assert (sample.swap_used_bytes, sample.swap_total_bytes) == (851 * MIB, 3810 * MIB)
    assert sample.cpu_loads == (0.15, 0.11, 0.14, 0.13, 0.11, 0.08)
    assert sample.gpu_load == 0.63
    assert sample.temperatures_celsius["tj"] == 53.968
    assert sample.rails == {"VDD_IN": Rail(12479, 12479), "VDD_CPU_GPU_CV": Rail(4667, 4667), "VDD_SOC": Rail(2817, 2817)}
    assert sample.watts == 12.479


def test_agx_orin_is_the_sum_of_three_rails_and_sensors_that_are_off_give_nothing() -> None:
    sample = parse_line(AGX_ORIN)

    assert sample is not None
    assert len(sample.cpu_loads) == 12
    assert "GPU" not in sample.temperatures_celsius
    assert "NC" not in sample.rails
    assert sample.whole_rails == ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
    assert sample.watts == pytest.approx(2.340 + 0.390 + 4.025)


def test_agx_xavier_is_the_sum_of_all_rails_in_the_layout_without_units() -> None:
    sample = parse_line(AGX_XAVIER)

    assert sample is not None
    assert set(sample.rails) == {"GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"}
    assert sample.watts == pytest.approx((463 + 618 + 2936 + 309 + 3306) / 1000)
    assert sample.temperatures_celsius["GPU"] == 30.5


def test_nano_tx2_and_tx1() -> None:
    nano, tx2, tx1 = parse_line(NANO), parse_line(TX2), parse_line(TX1)

    assert nano is not None and tx2 is not None and tx1 is not None
    assert nano.rails["POM_5V_IN"] == Rail(900, 943)
    assert nano.watts == 0.9
    assert tx2.rails["VDD_IN"] == Rail(1776, 1805)
    assert tx2.gpu_load == 0.36
    assert tx1.cpu_loads == (0.17, 0.11, 0.65, None)
    assert tx1.gpu_load == 0.39
    assert tx1.watts is None


def test_agx_thor_reports_the_whole_board_on_vin_and_parts_are_not_added_to_it() -> None:
    thor, without = parse_line(AGX_THOR), parse_line(AGX_THOR.replace("VIN 23000mW/23000mW", ""))

    assert thor is not None and without is not None
    assert thor.whole_rails == ("VIN",) and thor.watts == 23.0
    assert without.whole_rails == ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0") and without.watts == pytest.approx(15.38)


def test_a_rail_may_be_negative() -> None:
    line = AGX_THOR.replace("VDD_GPU 2350mW/2350mW", "VDD_GPU -392mW/-392mW")
    whole, parts = parse_line(line), parse_line(line.replace("VIN 23000mW/23000mW", ""))

    assert whole is not None and parts is not None
    assert whole.rails["VDD_GPU"] == Rail(-392, -392) and whole.watts == 23.0
    assert parts.watts == pytest.approx((-392 + 6510 + 6520) / 1000)
    old = parse_line("RAM 1/2MB GPU -5/463 CPU 618/618")
    assert old is not None and old.watts == pytest.approx(0.613)


@pytest.mark.parametrize("whole", ["VDD_IN", "POM_5V_IN", "VIN"])
@pytest.mark.parametrize(
    "parts", ["VDD_GPU 100mW/100mW VIN_SYS_5V0 300mW/300mW", "VIN_SYS_5V0 1mW VDDQ_VDD2_1V8AO 2mW NC 0mW/0mW"]
)
def test_no_part_is_added_to_a_rail_that_is_the_whole(whole: str, parts: str) -> None:
    for line in (f"RAM 1/2MB {whole} 5000mW/5000mW {parts}", f"RAM 1/2MB {parts} {whole} 5000mW/5000mW"):
        sample = parse_line(line)
        assert sample is not None and sample.whole_rails == (whole,) and sample.watts == 5.0


def test_unknown_fields_and_cut_lines_are_passed_over() -> None:
    odd = parse_line("RAM 10/20GB NEW [x] VDD_IN 5W/6W VDD_CPU 100mW FUTURE@12 GR3D_FREQ")

    assert odd is not None
    assert (odd.ram_used_bytes, odd.gpu_load, odd.cpu_loads) == (10 * 2**30, None, ())
    assert odd.rails == {"VDD_CPU": Rail(100, None)}
    assert parse_line("") is None
    assert parse_line("SRAM 1/2MB") is None


def test_a_line_without_the_whole_rail_is_left_out_of_the_energy() -> None:
    """The parts of the board are no stand-in for it: the window would be of two things."""
    sensors = Sensors()
    sensors._tegra = Tegrastats("tegrastats")
    lines = [AGX_THOR, AGX_THOR.replace("VIN 23000mW/23000mW", ""), AGX_THOR]
    sensors._tegra.samples = [(float(at), sample) for at, line in enumerate(lines) if (sample := parse_line(line))]

    for begin in (0.0, 1.0):
        energy = sensors.energy(begin, 2.0)
        assert energy.joules == (46.0 if begin == 0 else None)
    assert sensors.energy(0.0, 2.0).source == "tegrastats VIN"


def test_energy_is_the_area_under_the_power() -> None:
    assert integrate([(0.0, 2.0), (1.0, 4.0), (3.0, 4.0)]) == 3.0 + 8.0


@pytest.fixture
def stand_in(tmp_path: Path):
    """Writes an executable that stands in for tegrastats; `body` is shell."""

    def write(body: str) -> str:
        path = tmp_path / "tegrastats"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return write


def test_the_sampler_replays_lines_and_ends_its_program(stand_in, tmp_path: Path) -> None:
    # The program must also end the sleep that it started, so both write down who they are.
    program = stand_in(
        f'echo $$ > {tmp_path}/pid\n[ "$1 $2" = "--interval 100" ] || exit 9\n'
        f"while true; do echo '{ORIN_NANO}'; sleep 0.05; echo '{TX2}'; sleep 0.05; done"
    )
    with Sensors(program) as sensors:
        begin = time.monotonic()
        time.sleep(0.6)
        end = time.monotonic()
        energy, load = sensors.energy(begin, end), sensors.load(begin, end)

    assert energy.source == "tegrastats VDD_IN"
    assert energy.joules == pytest.approx((12.479 + 1.776) / 2 * (end - begin), rel=0.25)
    assert load is not None
    assert load.ram_peak_bytes == 6185 * MIB
    assert load.gpu_load_peak == 0.63
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("while true; do echo 'Segment fault, sorry'; sleep 0.02; done", "does not print what tegrastats prints"),
        ("echo 'cannot open /dev/nvmap' >&2; exit 3", "ended by itself with status 3, saying 'cannot open /dev/nvmap'"),
        ("sleep 60", "printed nothing"),
    ],
)
def test_a_program_that_misbehaves_is_a_sentence_and_no_error(stand_in, monkeypatch, tmp_path, body: str, words: str) -> None:
    # On a busy machine a program's first line may take seconds.
    monkeypatch.setattr(tegrastats, "FIRST_LINE_SECONDS", 0.5 if words == "printed nothing" else 5)
    with Sensors(stand_in(body), powercap=tmp_path / "none") as sensors:
        energy = sensors.energy(0.0, 1.0)

    assert energy.joules is None
    assert energy.reason is not None and words in energy.reason
    assert words in sensors.notes
    assert sensors.load(0.0, 1.0) is None


def test_a_program_that_ends_in_the_middle_leaves_its_samples_and_a_sentence(stand_in) -> None:
    with Tegrastats(stand_in(f"echo '{NANO}'; sleep 0.1; echo '{NANO}'")) as running:
        time.sleep(0.5)

        assert len(running.samples) == 2
        assert running.problem is not None and "ended by itself with status 0" in running.problem


def test_a_missing_program_is_a_sentence(tmp_path: Path, monkeypatch) -> None:
    with Sensors("/nowhere/tegrastats", powercap=tmp_path) as sensors:
        assert "there is no program '/nowhere/tegrastats'" in sensors.notes
    monkeypatch.setenv("TEGRASTATS", str(tmp_path / "absent"))
    assert tegrastats.find_tegrastats() is None
