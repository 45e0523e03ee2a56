"""Runs in the emulated process: engines by remote control, over stdin and stdout, for `tests.arm64.emulated`.

A request is a verb with its arguments, an answer is a value or the exception that was raised, both pickled.
"""

import os
import pickle
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from edge_client.engines import Engine, LoadedProgram, load_engine

PACKAGES = ("executorch", "onnxruntime", "numpy")


class Server:
    def __init__(self) -> None:
        self.engines: dict[str, Engine] = {}
        self.programs: list[LoadedProgram] = []  # closed ones stay, so that using one is answered by the engine itself

    def about(self) -> dict[str, str]:
        return {"machine": platform.machine()} | {package: version(package) for package in PACKAGES}

    def engine(self, name: Any) -> None:
        self.engines[name] = load_engine(name)

    def load(self, name: str, path: str, program: Any) -> int:
        self.programs.append(self.engines[name].load(Path(path), program))
        return len(self.programs) - 1

    def run(self, index: int, arrays: list[Any]) -> list[Any]:
        before = [array.tobytes() for array in arrays]
        outputs = self.programs[index].run(arrays)
        if [array.tobytes() for array in arrays] != before:
            raise AssertionError("the engine changed its inputs")
        return outputs

    def close(self, index: int) -> None:
        self.programs[index].close()


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    server = Server()
    while True:
        try:
            verb, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = getattr(server, verb)(*arguments)
        except Exception as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a runtime prints must not come between the answers
    serve(sys.stdin.buffer, answers)
