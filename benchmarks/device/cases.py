"""Which cases there are, and the records of a folder of prepared cases.

Each case is one way to train the same model; the list goes from the most expensive to the cheapest, and a case with a `+`
adds one thing to the case above it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lamina.bundles.manifest import EngineName
from lamina.errors import ConfigError
from lamina.plans.plan import Stage
from lamina.record import Record

Side = Literal["eager", "onnxruntime", "executorch", "torch"]
SIDES: tuple[Side, ...] = ("eager", "onnxruntime", "executorch", "torch")
BUNDLE = "bench.json"


@dataclass(frozen=True)
class Case:
    """One way to train.

    `graph` is what the program holds: the whole model with everything trained (full), the whole model with only the active
    block trained (flagged), or the active block alone (cut). `on_disk` reads every batch from a file instead of holding it.
    `is_micro` has a micro-batch of samples in memory at a time. With `prefix`, the process first runs the frozen layers, in
    this precision, to fill that file.
    """

    name: str
    graph: Literal["full", "flagged", "cut"]
    on_disk: bool = False
    is_micro: bool = False
    prefix: Literal["fp32", "int8"] | None = None

    def lacks(self, side: Side) -> str | None:
        """Why there is no such case for this engine, or None."""
        if side == "eager" and self.prefix:
            return "eager PyTorch has no feature cache to fill"
        if side == "torch" and self.graph == "flagged":
            return "the torch engine differentiates every weight of its program"
        return None


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("full", "full"),
        Case("flagged", "flagged"),
        Case("cut", "cut"),
        Case("cut+cache", "cut", on_disk=True),
        Case("+micro", "cut", on_disk=True, is_micro=True),
        Case("+fill", "cut", on_disk=True, is_micro=True, prefix="fp32"),
        Case("+int8", "cut", on_disk=True, is_micro=True, prefix="int8"),
    )
}


class Input(Record):
    """A batch input without its batch axis; `bound` is the exclusive upper bound of integers."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "int64"] = "float32"
    bound: int = 0


class ProgramFile(Record):
    """A program of `lamina.bundles.manifest` as the measuring process needs it; `file` lies in the folder of the bundle."""

    file: str
    role: str
    weights: tuple[tuple[int, ...], ...]
    inputs: tuple[Input, ...]
    max_batch: int
    precision: str
    activation_bytes: int | None


class PreparedCase(Record):
    """A case with everything that its process needs. `is_trained` has one entry for each weight of the step's programs.

    `planned_activation_bytes` is the largest plan of its programs, None where nobody plans. `unavailable` says why there is
    nothing to run.
    """

    workload: str
    side: Side
    case: str
    batch: int
    micro_batch: int | None
    block: int | None
    unavailable: str | None = None
    objective: Literal["supervised", "contrastive"]
    weights: tuple[tuple[int, ...], ...] = ()
    is_trained: tuple[bool, ...] = ()
    inputs: tuple[Input, ...] = ()
    programs: dict[str, ProgramFile] = Field(default_factory=dict)
    frozen: dict[str, tuple[ProgramFile, ...]] = Field(default_factory=dict)
    raw_inputs: tuple[Input, ...] = ()
    planned_activation_bytes: int | None = None
    model: dict[str, Any] = Field(default_factory=dict)
    stage: Stage | None = None
    active: tuple[str, ...] = ()

    @property
    def engine(self) -> EngineName:
        assert self.side != "eager"
        return self.side

    def label(self) -> str:
        return f"{self.workload}, {self.side}, {self.case}"


class BenchBundle(Record):
    """`bench.json`: the cases of a prepared folder, and what made it."""

    kind: Literal["lamina-bench-bundle"] = "lamina-bench-bundle"
    format: Literal[1] = 1
    command: str
    versions: dict[str, str]
    cases: tuple[PreparedCase, ...]


def read_bench_bundle(folder: Path) -> BenchBundle:
    """Raises ConfigError for a folder that `lamina bench prepare` did not write."""
    if not (folder / BUNDLE).is_file():
        raise ConfigError(f"{folder} has no {BUNDLE}: give a folder that `lamina bench prepare` wrote")
    return BenchBundle.from_file(folder / BUNDLE)
