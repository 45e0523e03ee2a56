"""What a device loads: asked in fresh processes, because this one has torch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_client.process import supervisor
from edge_client.process.memory import peak_bytes
from tests.edge_client.tiny import initial_weights

HEAVY = (
    "torch",
    "executorch",
    "onnx",
    "onnxruntime",
    "rich",
    "typer",
    "click",
    "pygments",
    "fastapi",
    "export",
    "coordinator",
    "cryptography",
)


def fresh(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_device_loads_no_runtime_and_no_command_line():
    loaded = fresh(f"import sys, edge_client.talk.device\nprint(*(name for name in {HEAVY} if name in sys.modules))")
    assert loaded == []


def test_the_hidden_modules_can_be_imported_afterwards():
    assert fresh("import edge_client.talk.device, httpx._main, sys\nprint('rich' in sys.modules)") == ["True"]


def test_onnxruntime_trains_without_torch_where_torch_is_installed(programs, tmp_path):
    program = programs.program("onnxruntime", "frozen", ["motion.stem"])
    (tmp_path / "program.json").write_bytes(program.to_json())
    np.savez(tmp_path / "weights.npz", *initial_weights()["motion.stem"].values())
    code = """
import sys
from pathlib import Path
import numpy as np
from edge_client.engines import load_engine
from lamina.bundles.manifest import Program
program = Program.from_file(Path(sys.argv[1]) / "program.json")
loaded = load_engine("onnxruntime").load(Path(sys.argv[2]), program)
weights = list(np.load(Path(sys.argv[1]) / "weights.npz").values())
(features,) = loaded.run([*weights, np.ones((2, 2, 8), np.float32)])
import importlib.util
print(features.shape == (2, 2, 4), "torch" in sys.modules, importlib.util.find_spec("torch") is not None)
"""
    assert fresh(code, tmp_path, programs.path(program)) == ["True", "False", "True"]


def test_executorch_loads_none_of_its_own_python():
    code = "import sys\nfrom edge_client.engines import load_engine\nload_engine('executorch')\n"
    assert fresh(code + "print(*(n for n in ('executorch.exir', 'torchao', 'executorch.runtime') if n in sys.modules))") == []


@pytest.mark.parametrize(("module", "most"), [("edge_client.talk.device", 64), ("edge_client.train.trainer", 30)])
def test_a_process_of_the_device_stays_small(module, most):
    (bytes_,) = fresh(f"import {module}\nfrom edge_client.process.memory import peak_bytes\nprint(peak_bytes())")
    assert int(bytes_) < most << 20


def test_the_training_process_loads_neither_messages_nor_http_nor_hashing():
    names = ("pydantic", "httpx", "ssl", "http", "hashlib", "numpy.random", "zipfile", "lamina.bundles.manifest", "subprocess")
    assert fresh(f"import sys, edge_client.train.trainer\nprint(*(name for name in {names} if name in sys.modules))") == []


def test_the_supervisor_is_a_bare_interpreter():
    """It stays for the whole life of the device, beside whatever trains."""
    isolated = "[sys.executable, '-I', '-S', '-c', sys.argv[1]]"
    code = f"import subprocess, sys\nprint(subprocess.run({isolated}, capture_output=True, text=True).stdout)"
    probe = """
import runpy, sys
found = runpy.run_path(sys.argv[1] if len(sys.argv) > 1 else PATH)
print([n for n in ('numpy', 'lamina', 'edge_client', 'subprocess', 'pathlib', 'ctypes') if n in sys.modules])
print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])
""".replace("PATH", repr(str(Path(supervisor.__file__))))
    *loaded, peak_kib = fresh(code, probe)
    assert loaded == ["[]"]
    assert int(peak_kib) < 12 * 1024


def test_the_peak_counts_what_was_freed_again():
    code = """
import numpy as np
from edge_client.process.memory import peak_bytes
before = peak_bytes()
np.ones(100 << 20, np.uint8).sum()
print(peak_bytes() - before)
"""
    assert int(fresh(code)[0]) > 90 << 20


def test_without_proc_the_peak_comes_from_the_operating_system(tmp_path):
    assert peak_bytes(tmp_path / "none") == pytest.approx(peak_bytes(), rel=0.5)


def test_an_epoch_over_a_large_feature_file_does_not_fill_the_memory(tmp_path):
    code = """
import sys
from pathlib import Path
import numpy as np
from numpy.lib import format as npy
from edge_client.process.memory import peak_bytes
from edge_client.rows.row_files import RowFile
path = Path(sys.argv[1])
with path.open("wb") as file:  # 400 MiB of zeros, which take no place on the disk
    npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1600, 256, 256)})
    file.truncate(file.tell() + 1600 * 256 * 256 * 4)
rows = RowFile(path)
before = peak_bytes()
for batch in np.random.default_rng(0).permutation(1600).reshape(-1, 16):
    assert rows.take(batch).shape == (16, 256, 256)
print(peak_bytes() - before)
"""
    assert int(fresh(code, tmp_path / "features.npy")[0]) < 20 << 20
