"""The ExecuTorch engine itself: its arrays, its errors, its memory. That it computes right is asked in test_engines.py."""

import io
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edge_client.engines import load_engine
from edge_client.engines.base import program_arrays
from lamina.errors import EngineError
from tests.edge_client.tiny import CHANNELS, MAX_BATCH, SAMPLES, initial_weights

STEM = ["motion.stem"]
OPEN = """
import sys
from pathlib import Path
import numpy as np
from edge_client.engines import load_engine
from types import SimpleNamespace
folder = Path(sys.argv[1])
x = SimpleNamespace(name="x", shape=(2, 8), dtype="float32")
program = SimpleNamespace(weights=((4, 8), (4,)), inputs=(x,), max_batch=8, precision="fp32", references=(), frozen=())
weights = [np.ones((4, 8), np.float32), np.ones(4, np.float32)]
engine = load_engine("executorch")
"""


@pytest.fixture
def stem(programs):
    return programs.program("executorch", "frozen", STEM)


@pytest.fixture
def loaded(programs, stem):
    loaded = load_engine("executorch").load(programs.path(stem), stem)
    yield loaded
    loaded.close()


@pytest.fixture
def stem_file(programs, stem, tmp_path):
    shutil.copy(programs.path(stem), tmp_path / "program")
    return tmp_path / "program"


def arrays(count=2):
    weights = list(initial_weights()["motion.stem"].values())
    return [*weights, np.ones((count, CHANNELS, SAMPLES), np.float32)]


def fresh(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", OPEN + code, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


class EveryType:
    """A `.pte` of inputs that training programs do not have, as an int8 prefix does; and its description."""

    role, precision, weights, frozen, references, max_batch = "frozen", "fp32", (), (), (), 4

    def __init__(self, folder):
        import torch
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass
        from torch.export import Dim, export

        class Module(torch.nn.Module):
            def forward(self, matrix, mask, index, deep):
                value = matrix.to(torch.float32) * mask.to(torch.float32)[:, None]
                return value, index + 1, deep * 2.0, torch.logical_not(mask), -matrix, deep.sum()

        shapes_and_dtypes = (((3,), "int8"), ((), "bool"), ((), "int64"), ((1, 2, 1, 2), "float32"))
        self.inputs = tuple(SimpleNamespace(shape=shape, dtype=dtype) for shape, dtype in shapes_and_dtypes)
        example = tuple(torch.ones(2, *i.shape).to(getattr(torch, i.dtype)) for i in self.inputs)
        shapes = tuple({0: Dim("batch", min=1, max=self.max_batch)} for _ in example)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            edge = to_edge_transform_and_lower(
                export(Module(), example, dynamic_shapes=shapes), compile_config=EdgeCompileConfig(_skip_dim_order=True)
            )
            config = ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False))
            self.path = folder / "every_type"
            buffer = io.BytesIO(edge.to_executorch(config).buffer)
        self.path.write_bytes(buffer.getvalue())


def test_int8_bool_int64_and_deep_arrays_go_in_and_out(tmp_path):
    program = EveryType(tmp_path)
    loaded = load_engine("executorch").load(program.path, program)
    for count in (1, 3, 4, 2):
        random = np.random.default_rng(count)
        matrix, mask = random.integers(-127, 128, (count, 3)).astype(np.int8), random.integers(0, 2, count).astype(bool)
        index, deep = random.integers(-9, 9, count), random.normal(size=(count, 1, 2, 1, 2)).astype(np.float32)
        value, following, doubled, unmasked, negative, total = loaded.run([matrix, mask, index, deep])

        np.testing.assert_array_equal(value, matrix * mask[:, None].astype(np.float32))
        np.testing.assert_array_equal(following, index + 1)
        np.testing.assert_array_equal(doubled, deep * 2)
        np.testing.assert_array_equal(unmasked, ~mask)
        np.testing.assert_array_equal(negative, -matrix)
        assert total.shape == () and total == pytest.approx(deep.sum(), abs=1e-5)
        assert [out.dtype for out in (value, following, unmasked, negative)] == ["float32", "int64", "bool", "int8"]
    loaded.close()


def test_inputs_are_read_in_place_and_outputs_are_not_copied(loaded):
    given = arrays()
    (first,) = loaded.run(given)
    before = first.copy()
    given[0] *= 2
    (second,) = loaded.run(given)

    assert not first.flags.owndata
    assert first.ctypes.data == second.ctypes.data
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(before, second)


@pytest.mark.parametrize(
    ("index", "array", "words"),
    [
        (0, np.zeros((4, 9), np.float32), r"array 0 .* must be float32\[4, 8\] and contiguous, given float32\[4, 9\]"),
        (0, np.zeros((4, 8), np.float64), r"given float64\[4, 8\]"),
        (0, np.zeros((4, 8), np.int8), r"given int8\[4, 8\]"),
        (0, np.zeros((8, 4), np.float32).T, r"given float32\[4, 8\], not contiguous"),
        (0, np.zeros((1, 8), np.float32), r"given float32\[1, 8\]"),
        (1, np.zeros((1, 4), np.float32), r"must be float32\[4\]"),
        (2, np.zeros((2, CHANNELS, SAMPLES + 1), np.float32), r"must be float32\[2, 2, 8\] .* given float32\[2, 2, 9\]"),
        (2, np.zeros((2, CHANNELS, SAMPLES - 1), np.float32), r"given float32\[2, 2, 7\]"),
        (2, np.zeros((MAX_BATCH + 1, CHANNELS, SAMPLES), np.float32), r"must be float32\[8, 2, 8\] .* float32\[9, 2, 8\]"),
        (2, np.zeros((0, CHANNELS, SAMPLES), np.float32), r"given float32\[0, 2, 8\]"),
        (2, np.zeros((), np.float32), r"given float32\[\]"),
        (2, np.zeros((1,) * 20, np.float32), "given float32"),
    ],
)
def test_an_array_that_does_not_fit_is_refused_and_the_program_stays_usable(loaded, index, array, words):
    given = arrays()
    expected = loaded.run(given)[0].copy()
    with pytest.raises(EngineError, match=words):
        loaded.run([*given[:index], array, *given[index + 1 :]])
    np.testing.assert_array_equal(loaded.run(given)[0], expected)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_number_of_arrays_is_refused(loaded, count):
    with pytest.raises(EngineError, match=f"takes 3 arrays, given {count}"):
        loaded.run([*arrays(), *arrays()][:count])


def test_a_label_that_no_class_has_is_an_error_of_the_runtime(programs):
    program = programs.program("executorch", "train", [*STEM, "motion.layers.0", "motion.norm", "motion.projection", "head"])
    loaded = load_engine("executorch").load(programs.path(program), program)
    given = [np.ones(shape, dtype) for shape, dtype in program_arrays(program)]
    given[-1][:] = 99
    with pytest.raises(EngineError, match=r"executorch failed in program \w+: \w+ \(0x12\)"):
        loaded.run(given)
    loaded.close()


def test_a_closed_program_is_refused_and_closing_twice_is_allowed(loaded):
    loaded.close()
    loaded.close()
    with pytest.raises(EngineError, match="was closed"):
        loaded.run(arrays())


def test_the_file_may_vanish_after_loading(stem_file, stem):
    loaded = load_engine("executorch").load(stem_file, stem)
    stem_file.write_bytes(b"")
    stem_file.unlink()
    assert loaded.run(arrays())[0].shape == (2, 2, 4)
    loaded.close()


def test_a_missing_file_is_an_engine_error_with_the_runtime_s_own_words(tmp_path):
    """In a process of its own: where the exporter's bindings were loaded first, the runtime's log is theirs."""
    code = """
from lamina.errors import EngineError
try:
    engine.load(folder / "none", program)
except EngineError as error:
    print(error.message)
"""
    done = fresh(code, tmp_path)
    assert re.search(r"cannot load program none: AccessFailed \(0x22\): .*No such file", done.stdout), done.stdout + done.stderr


def test_another_type_than_the_manifest_says_is_refused(programs, stem):
    with pytest.raises(EngineError, match=r"takes arrays float32\[4, 8\], .* but its manifest says int8\[4, 8\], float32\[4\]"):
        load_engine("executorch").load(programs.path(stem), stem.model_copy(update={"precision": "int8"}))


def test_a_program_cut_anywhere_is_an_engine_error(stem_file):
    code = """
from lamina.errors import EngineError
data = (folder / "program").read_bytes()
for size in range(0, len(data), max(1, len(data) // 97)):
    (folder / "cut").write_bytes(data[:size])
    try:
        engine.load(folder / "cut", program)
        raise SystemExit(f"{size} bytes of {len(data)} were loaded")
    except EngineError as error:
        assert str(error).startswith("executorch cannot load program cut: "), error
(folder / "cut").write_bytes(b"PK" + bytes(5000))
try:
    engine.load(folder / "cut", program)
except EngineError as error:
    print(error)
"""
    done = fresh(code, stem_file.parent)
    assert done.returncode == 0, done.stderr
    assert "cannot load program cut: InvalidProgram (0x23)" in done.stdout


def test_an_engine_of_its_own_process_has_no_torch_one_thread_and_nothing_to_say(stem_file):
    code = """
import os
loaded = engine.load(folder / "program", program)
(out,) = loaded.run([*weights, np.ones((2, 2, 8), np.float32)])
assert out.shape == (2, 2, 4)
heavy = ("torch", "executorch", "subprocess", "hashlib", "importlib.metadata", "pydantic")
print([name for name in heavy if name in sys.modules])
threads = os.listdir("/proc/self/task")
before = int(os.environ["OPENBLAS_NUM_THREADS"])
print(len(threads) - before)
"""
    load_engine("executorch")  # so that the shim is there and the process does not build it
    done = subprocess.run(
        [sys.executable, "-c", OPEN + code, str(stem_file.parent)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[]\n0\n", "")


def test_loading_and_closing_again_and_again_keeps_the_memory(stem_file):
    code = """
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
x = np.ones((8, 2, 8), np.float32)
for cycle in range(600):
    loaded = engine.load(folder / "program", program)
    loaded.run([*weights, x])
    loaded.close()
    if cycle == 100:
        before = resident()
print(resident() - before)
"""
    done = fresh(code, stem_file.parent)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1 << 20


def test_the_engine_costs_less_than_8_mib(stem_file):
    code = OPEN.replace("engine = ", "before = int(Path('/proc/self/statm').read_text().split()[1])\nengine = ")
    code += "print((int(Path('/proc/self/statm').read_text().split()[1]) - before) * 4096)"
    load_engine("executorch")
    done = subprocess.run([sys.executable, "-c", code, str(stem_file.parent)], capture_output=True, text=True, check=False)
    assert int(done.stdout) < 8 << 20, done.stderr


def test_the_source_of_the_shim_is_part_of_the_package():
    import tomllib

    package_data = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    assert package_data["edge_client.engines"] == ["*.cpp"]
