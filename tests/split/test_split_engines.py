"""Neither end needs torch, and ExecuTorch runs the programs as well."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from export.split.functions import split_functions
from export.split.graphs import eager, graph
from export.split.split import make_parts
from lamina.encoding.tensors import hash_bytes
from lamina.plans.segments import TensorSpec
from lamina.split.manifest import SplitProgram
from tests.split.house import make_plan

IMPORTS = """
import sys
import coordinator.split.routes, edge_client.split.user
from edge_client.engines import load_engine
load_engine("onnxruntime")
assert "torch" not in sys.modules
"""


def test_neither_the_coordinator_nor_a_user_loads_torch() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)


def test_executorch_runs_the_backward_program_of_an_adapter(tmp_path: Path) -> None:
    """Slow: it lowers one small program."""
    pytest.importorskip("executorch")
    from edge_client.split.runtime import EngineRuntime
    from export.lowering.lower_executorch import lower_executorch

    plan = make_plan()
    function = next(f for f in split_functions(plan, make_parts(plan)) if f.name == "image.low_backward")
    random = torch.Generator().manual_seed(0)
    weights = tuple(0.3 * torch.randn(value.shape, generator=random) for value in function.module.parameters())
    inputs = tuple(torch.randn(2, 4, 16, generator=random) for _ in function.inputs)
    data, _ = lower_executorch(graph(function, lambda taken: taken, weights, inputs, 8))
    (tmp_path / "program").write_bytes(data)
    program = SplitProgram(
        engine="executorch",
        blob=hash_bytes(data),
        runs_on="device",
        parts=function.parts,
        weights=tuple(tuple(value.shape) for value in weights),
        inputs=tuple(TensorSpec(name=name, shape=(4, 16)) for name in function.inputs),
        outputs=function.outputs,
        max_batch=8,
        activation_bytes=0,
    )
    loaded = EngineRuntime("executorch").load(tmp_path / "program", program)
    given = loaded.run([value.numpy() for value in (*weights, *inputs)])
    for actual, expected in zip(given, eager(function, lambda taken: taken, weights, inputs), strict=True):
        assert np.abs(actual - expected.numpy()).max() < 1e-5
