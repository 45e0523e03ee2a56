"""The result file of `lamina bench memory`: one machine, one row for each case."""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from benchmarks.device.cases import Side
from benchmarks.device.watch import Status
from lamina.errors import ConfigError
from lamina.files import write_durably
from lamina.record import Record, explain

KIND: Literal["lamina-bench-memory"] = "lamina-bench-memory"
FORMAT: Literal[1] = 1


class Row(Record):
    """One case as it was measured. What could not be measured is None; `energy_reason` and `detail` say why.

    `steps` were timed; the seconds are medians. `memory_bytes` is the resident set after the imports of numpy and of the
    engine, and after loading. RAM and GPU load are those of the whole machine, from tegrastats.
    """

    workload: str
    side: Side
    case: str
    optimizer: str
    batch: int
    micro_batch: int | None = None
    block: int | None = None
    status: Status
    detail: str = ""
    steps: int = 0
    peak_rss_bytes: int | None = None
    peak_pss_bytes: int | None = None
    planned_bytes: int | None = None
    memory_bytes: dict[str, int] = Field(default_factory=dict)
    cuda_peak_bytes: int | None = None
    gpu: str | None = None
    cpu_seconds_per_step: float | None = None
    wall_seconds_per_step: float | None = None
    fill_cpu_seconds: float | None = None
    joules_per_step: float | None = None
    energy_source: str | None = None
    energy_reason: str | None = None
    ram_before_bytes: int | None = None
    ram_peak_bytes: int | None = None
    gpu_load_mean: float | None = None
    gpu_load_peak: float | None = None

    @property
    def key(self) -> tuple[str, str, str, str, int, int | None, int | None]:
        """What makes two rows of two machines comparable."""
        return (self.workload, self.side, self.case, self.optimizer, self.batch, self.micro_batch, self.block)


class MemoryResult(Record):
    """What `lamina bench memory` writes. `prepared` are the versions that made the programs."""

    kind: Literal["lamina-bench-memory"] = KIND
    format: Literal[1] = FORMAT
    command: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    prepared: dict[str, str]
    threads: Literal[1] = 1
    sensors: str
    rows: tuple[Row, ...]

    @property
    def device(self) -> str:
        return str(self.machine.get("model", "unknown machine"))


def write_result(path: Path, result: MemoryResult) -> None:
    """Whole or not at all, so that a machine that dies in the next case keeps the cases before it."""
    write_durably(path, result.to_json())


def read_result(path: Path) -> MemoryResult:
    """Raises ConfigError for a file that is missing, no result of `lamina bench memory`, or of another format."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{path} is no result of `lamina bench memory`: it is not JSON") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ConfigError(f"{path} is no result of `lamina bench memory`: its `kind` is not {KIND!r}")
    if content.get("format") != FORMAT:
        raise ConfigError(
            f"{path} has format {content.get('format')}, this lamina reads format {FORMAT}: measure again, or use the "
            "lamina that wrote it"
        )
    try:
        return MemoryResult.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path} is a damaged result: {explain(error)}") from error


def ratio(over: int | float | None, under: int | float | None) -> float | None:
    """over / under, None where one is unknown."""
    return over / under if over and under else None
