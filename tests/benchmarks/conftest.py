"""A folder of prepared cases of the `tiny` workload, made once for all test processes."""

import fcntl
from pathlib import Path

import pytest

from benchmarks.device.cases import CASES, BenchBundle, read_bench_bundle
from benchmarks.device.prepare import Order, prepare


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BenchBundle]:
    shared = tmp_path_factory.getbasetemp()
    if shared.name.startswith("popen-"):  # a worker of pytest-xdist: the folder above belongs to all of them
        shared = shared.parent
    folder = shared / "bench-tiny"
    with (shared / "bench-tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            # The last case has the others' batch as its micro-batch: so they share the programs, each seconds to lower.
            orders = [
                Order("tiny", "onnxruntime", CASES[name], 4, None, None) for name in ("full", "flagged", "cut", "cut+cache")
            ]
            orders.append(Order("tiny", "onnxruntime", CASES["+int8"], 8, 4, None))
            orders += [
                Order("tiny", "eager", CASES["cut"], 4, None, None),
                Order("tiny", "torch", CASES["flagged"], 4, None, None),
            ]
            prepare(orders, folder, "test", workers=1)
    return folder, read_bench_bundle(folder)
