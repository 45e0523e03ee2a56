"""ONNX Runtime: `.onnx` files in a plain InferenceSession, without torch in the process."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edge_client.engines.base import Array, LoadedProgram, program_arrays
from lamina.errors import EngineError
from lamina.light_imports import hidden
from lamina.names import EngineName, ProgramShape

with hidden("onnxruntime.training"):  # it would import torch wherever torch is installed: 283 MiB instead of 43
    import onnxruntime

_DTYPES = {"tensor(float)": np.dtype(np.float32), "tensor(int64)": np.dtype(np.int64), "tensor(int8)": np.dtype(np.int8)}


class OnnxRuntimeProgram:
    def __init__(self, path: Path, program: ProgramShape) -> None:
        self._file = path.name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Both for memory: one arena for all sessions, which grows by what is asked for and not to the next power of two, and
        # no plan of a whole step's memory beside the arena. Together 5 to 9 MiB less for one ViT-Tiny block, at the same speed.
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.enable_mem_pattern = False
        options.log_severity_level = 4  # errors come as exceptions; the runtime's own copy on stderr would say it twice
        try:
            self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime raises its own classes, which have no common base
            raise EngineError(f"onnxruntime cannot load program {path.name}: {error}") from error
        inputs = self._session.get_inputs()
        self._names = [value.name for value in inputs]
        given = [
            # The batch is the only axis with a name instead of a size.
            (tuple(program.max_batch if isinstance(size, str) else size for size in value.shape), _DTYPES.get(value.type))
            for value in inputs
        ]
        expected = program_arrays(program)
        if given != expected:
            raise EngineError(f"program {path.name} takes arrays {given}, but its manifest says {expected}")

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

    def __init__(self) -> None:
        _make_arena()

    def load(self, path: Path, program: ProgramShape) -> LoadedProgram:
        return OnnxRuntimeProgram(path, program)


@cache  # the runtime has one such arena for each process
def _make_arena() -> None:
    grow_by_what_is_asked_for = 1
    arena = onnxruntime.OrtArenaCfg(
        {
            "max_mem": 0,
            "arena_extend_strategy": grow_by_what_is_asked_for,
            "initial_chunk_size_bytes": -1,
            "max_dead_bytes_per_chunk": -1,
        }
    )
    kind, memory = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    onnxruntime.create_and_register_allocator(onnxruntime.OrtMemoryInfo("Cpu", kind, 0, memory), arena)


ENGINE = OnnxRuntime
