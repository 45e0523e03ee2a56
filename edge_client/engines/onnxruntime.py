"""ONNX Runtime: `.onnx` files in a plain InferenceSession, without torch in the process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from edge_client.engines.base import Array, LoadedProgram
from edge_client.light_imports import hidden
from lamina.errors import EngineError
from lamina.manifest import EngineName, Program

with hidden("onnxruntime.training"):  # it would import torch wherever torch is installed: 283 MiB instead of 43
    import onnxruntime


class OnnxRuntimeProgram:
    def __init__(self, path: Path, program: Program) -> None:
        self._file = path.name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # errors come as exceptions; the runtime's own copy on stderr would say it twice
        try:
            self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime raises its own classes, which have no common base
            raise EngineError(f"onnxruntime cannot load program {path.name}: {error}") from error
        inputs = self._session.get_inputs()
        self._names = [value.name for value in inputs]
        shapes = [tuple(value.shape) for value in inputs]
        batch = shapes[len(program.weights)][:1] if len(shapes) > len(program.weights) else ()
        expected = [*program.weights, *((*batch, *spec.shape) for spec in program.inputs)]
        if shapes != expected:
            raise EngineError(f"program {path.name} takes arrays of shapes {shapes}, but its manifest says {expected}")

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        try:
            outputs: list[Array] = self._session.run(None, dict(zip(self._names, arrays, strict=True)))
        except Exception as error:
            raise EngineError(f"onnxruntime failed in program {self._file}: {error}") from error
        return outputs

    def close(self) -> None:
        self._session = None


class OnnxRuntime:
    name: ClassVar[EngineName] = "onnxruntime"

    def load(self, path: Path, program: Program) -> LoadedProgram:
        return OnnxRuntimeProgram(path, program)


ENGINE = OnnxRuntime
