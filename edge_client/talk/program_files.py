"""Programs and segments of a manifest as a job names them: with the files that they are in."""

from collections.abc import Callable, Sequence
from pathlib import Path

from edge_client.job import ProgramFile, ReferenceFile, SegmentFile, Tensor
from lamina.bundles.manifest import Manifest, Program
from lamina.names import Role
from lamina.plans.segments import Segment, TensorSpec

Fetch = Callable[[str], Path]
"""A blob's file by its sha256, downloaded if it is not there yet, and verified."""


def program_file(program: Program, role: Role, path: Path | None) -> ProgramFile:
    """One file may serve two roles (torch derives the gradients itself), so the role is that of the place, not the file's."""
    return ProgramFile(
        path=str(path or ""),
        blob=program.blob,
        role=role,
        weights=program.weights,
        inputs=_tensors(program.inputs),
        max_batch=program.max_batch,
        precision=program.precision,
        references=tuple(ReferenceFile(each.kind, each.tensors) for each in program.references),
        frozen=program.frozen,
    )


def segment_file(segment: Segment, path: Path | None, frozen: Path | None = None) -> SegmentFile:
    """`frozen` is the file of its frozen tensors, if it has any and they are needed."""
    return SegmentFile(
        segment.name, str(path or ""), _tensors(segment.tensors), str(frozen or ""), _tensors(segment.frozen if frozen else ())
    )


def frozen_file(manifest: Manifest, name: str, fetch: Fetch) -> Path | None:
    """The file of a segment's frozen tensors; None if it has none."""
    return fetch(manifest.frozen_tensors[name]) if name in manifest.frozen_tensors else None


def _tensors(specs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
    return tuple(Tensor(spec.name, spec.shape, spec.dtype) for spec in specs)
