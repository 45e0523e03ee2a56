"""Cases in fresh processes: plausible numbers, what a device imports, and cases that end badly."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from benchmarks.device import case as case_process
from benchmarks.device.cases import CASES, BenchBundle, PreparedCase, read_bench_bundle
from benchmarks.device.measure import Settings, measure, planned_bytes
from benchmarks.device.prepare import Order
from benchmarks.device.results import Row, read_result, write_result
from benchmarks.device.tables import faults
from benchmarks.device.watch import Watched, watch
from benchmarks.device.workloads import WORKLOADS, one_stage_plan, stage_of
from lamina.errors import ConfigError

MIB = 2**20


def rows_of(
    prepared: tuple[Path, BenchBundle], names: tuple[str, ...], side: str = "onnxruntime", watch_case=watch
) -> list[Row]:
    folder, bundle = prepared
    cases = [case for case in bundle.cases if case.side == side and case.case in names]
    assert len(cases) == len(names)
    return list(measure(bundle, folder, cases, Settings(2, ("sgd",)), "test", watch_case=watch_case).rows)


def test_every_case_of_an_engine_gives_plausible_numbers(prepared) -> None:
    names = ("full", "cut", "cut+cache", "+int8")
    rows = rows_of(prepared, names)

    assert [(row.case, row.status, row.detail) for row in rows] == [(name, "ok", "") for name in names]
    for row in rows:
        assert row.peak_rss_bytes is not None and row.peak_pss_bytes is not None
        assert row.memory_bytes["numpy"] < row.memory_bytes["engine"] < row.peak_rss_bytes < 200 * MIB
        assert 10 * MIB < row.peak_pss_bytes <= row.peak_rss_bytes
        assert row.steps == 2
        assert row.cpu_seconds_per_step is not None and 0 < row.cpu_seconds_per_step < 1
        assert row.joules_per_step is None or row.energy_source
        assert row.joules_per_step is not None or row.energy_reason
        assert row.planned_bytes is not None and row.planned_bytes < row.peak_rss_bytes
    by_case = {row.case: row for row in rows}
    assert by_case["cut"].planned_bytes < by_case["full"].planned_bytes
    assert by_case["+int8"].fill_cpu_seconds is not None and by_case["cut"].fill_cpu_seconds is None


def test_flagged_holds_the_whole_graph_and_trains_the_last_block(prepared) -> None:
    _, bundle = prepared
    full, flagged, cut = (next(c for c in bundle.cases if c.case == name) for name in ("full", "flagged", "cut"))

    assert flagged.weights == full.weights and all(full.is_trained)
    trained = [shape for shape, flag in zip(flagged.weights, flagged.is_trained, strict=True) if flag]
    assert trained == list(cut.weights)
    (row,) = rows_of(prepared, ("flagged",))
    assert (row.status, row.planned_bytes) == ("ok", None)


def test_eager_runs_and_a_case_that_cannot_be_is_told(prepared) -> None:
    (eager,) = rows_of(prepared, ("cut",), "eager")
    (flagged,) = rows_of(prepared, ("flagged",), "torch")

    assert (eager.status, eager.detail) == ("ok", "")
    assert eager.peak_rss_bytes > 100 * MIB  # torch alone
    assert (flagged.status, flagged.detail) == ("not run", "the torch engine differentiates every weight of its program")


def test_a_case_of_an_engine_imports_neither_torch_nor_pydantic(prepared, tmp_path) -> None:
    imports = """
import atexit, os, runpy, sys

def tell():
    print([name for name in ("torch", "pydantic", "httpx", "rich") if name in sys.modules], file=sys.stderr, flush=True)
    os._exit(7)

atexit.register(tell)
runpy.run_module("benchmarks.device.case", run_name="__main__")
"""

    def run(command, *rest) -> Watched:
        return watch([sys.executable, "-c", imports, command[-1]], *rest)

    (row,) = rows_of(prepared, ("+int8",), watch_case=run)

    assert row.detail == "ended with status 7: []"


def replaced_by(code: str):
    """A `watch` whose process runs this code first."""

    def run(command, *rest) -> Watched:
        whole = f"import sys; sys.argv[1:] = [{command[-1]!r}]; {code}; import runpy; "
        return watch([sys.executable, "-c", whole + "runpy.run_module('benchmarks.device.case', run_name='__main__')"], *rest)

    return run


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed", "SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "crashed", "crashed in native code with SIGSEGV"),
        # What Python and numpy have, and 4 MiB: too little for an engine.
        (
            "import numpy, pathlib, resource; pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0]); "
            "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 20),) * 2)",
            "failed",
            "out of memory",
        ),
        ("import sys; sys.modules['onnxruntime'] = None", "failed", "is not installed here"),
    ],
)
def test_a_case_that_ends_badly_says_so_and_the_others_go_on(prepared, tmp_path, code: str, status: str, words: str) -> None:
    folder, bundle = prepared
    cases = [case for case in bundle.cases if case.side == "onnxruntime" and case.case in ("cut", "full")]
    broken, calls = replaced_by(code), []

    def first_is_broken(*arguments) -> Watched:
        calls.append(arguments)
        return (broken if len(calls) == 1 else watch)(*arguments)

    out = tmp_path / "result.json"
    measure(bundle, folder, cases, Settings(1, ("sgd",)), "test", lambda r: write_result(out, r), watch_case=first_is_broken)

    first, second = read_result(out).rows
    assert (first.status, second.status) == (status, "ok"), first.detail
    assert words.lower() in first.detail.lower()
    assert first.cpu_seconds_per_step is None
    assert faults([first, second]) == [f"tiny, onnxruntime, full, sgd, batch 4: {status}: {first.detail}"]


def test_a_gpu_that_is_not_there_or_goes_away_is_a_sentence(prepared) -> None:
    folder, bundle = prepared
    cases = [case for case in bundle.cases if case.side == "eager" and case.case == "cut"]
    (row,) = measure(bundle, folder, cases, Settings(1, ("sgd",), is_cuda=True), "test").rows

    if row.status != "ok":  # on a machine with a GPU it simply works
        assert row.status == "failed"
        assert row.detail.startswith("the GPU failed or is not there:")
    lost = case_process.explain(RuntimeError("CUDA error: unspecified launch failure"))
    assert lost == "the GPU failed or is not there: CUDA error: unspecified launch failure"
    assert case_process.explain(MemoryError()) == "out of memory: MemoryError"


def test_a_process_that_takes_too_long_is_ended() -> None:
    watched = watch([sys.executable, "-c", "import time; time.sleep(60)"], timeout_seconds=0.3)

    assert (watched.status, watched.detail) == ("killed", "ended by lamina: it took longer than 0 s")


def test_the_process_ends_with_the_one_that_measures() -> None:
    class Stop(Exception):
        pass

    seen: list[int] = []

    def stop(watched: Watched) -> None:
        if watched.events:
            seen.append(watched.events[0]["pid"])
            raise Stop

    script = 'import json, os, time; print(json.dumps({"event": "pid", "pid": os.getpid()}), flush=True); time.sleep(60)'
    with pytest.raises(Stop):
        watch([sys.executable, "-c", script], None, stop)
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0], signal.SIGCONT)


def test_planned_bytes_count_weights_gradients_moments_and_activations(prepared) -> None:
    _, bundle = prepared
    case = next(c for c in bundle.cases if c.case == "cut" and c.side == "onnxruntime").model_copy(
        update={"weights": ((2, 3), (4,)), "is_trained": (False, True), "planned_activation_bytes": 1000}
    )

    assert planned_bytes(case, "sgd") == 4 * (6 + 4 + 4 + 4) + 1000
    assert planned_bytes(case, "adamw") == 4 * (6 + 4 + 4 + 8) + 1000


def test_the_workloads_are_what_they_are_called() -> None:
    vit, pair = WORKLOADS["vit12"], WORKLOADS["pair"]

    assert [encoder.layers for encoder in pair.model.encoders] == [12, 6]
    assert (vit.batch, pair.batch, pair.model.objective.kind) == (16, 64, "contrastive")
    assert [name for name in stage_of(pair.model, None).active if ".layers." in name] == ["image.layers.11", "text.layers.5"]
    assert "text.stem" in stage_of(pair.model, 0).active
    assert [name for name in stage_of(pair.model, 8).active if ".layers." in name] == ["image.layers.8"]
    for name, workload in WORKLOADS.items():
        assert workload.batch % workload.micro_batch == 0, name
        for block in (None, 0, 1):
            assert one_stage_plan(workload, "cut", block, workload.batch).stages[0].active


def test_orders_and_folders_that_cannot_work_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="micro-batch 3 does not divide the batch 4"):
        Order("tiny", "eager", CASES["+micro"], 4, 3, None)
    with pytest.raises(ConfigError, match="blocks 0 to 1, not 2"):
        Order("tiny", "eager", CASES["cut"], 4, None, 2)
    with pytest.raises(ConfigError, match=r"has no bench\.json"):
        read_bench_bundle(tmp_path)


def test_a_prepared_case_is_plain_json(prepared) -> None:
    folder, bundle = prepared
    content = json.loads((folder / "bench.json").read_text())

    assert [PreparedCase.model_validate(case) for case in content["cases"]] == list(bundle.cases)
    files = {p["file"] for case in content["cases"] for p in case.get("programs", {}).values()}
    assert all((folder / name).is_file() for name in files)
