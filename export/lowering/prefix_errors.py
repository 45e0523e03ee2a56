"""What int8 weights do to the features of a frozen prefix: measured at export, by each engine's own programs.

    |int8 - fp32| / |fp32|   after each frozen segment, Euclidean norms over all samples

Errors add up over layers, so the whole chain is run in int8 and compared with the whole chain in eager float32.
"""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from export.graphs.frozen import segment_precision, take
from export.inputs import example_inputs, raw_input
from export.lowering.runtimes import Run, is_installed, open_program
from export.models.parameters import in_order
from lamina.bundles.manifest import EngineName
from lamina.errors import DataError
from lamina.plans.model import Encoder, ModuleEncoder
from lamina.plans.plan import Plan
from lamina.plans.segments import prefix_chain

ROWS = 64
RANDOM_INPUTS = "random inputs"
_DIGITS = 6  # the last digits of a float32 chain differ between processors, and a bundle should not

Chains = dict[str, list[str]]
"""The frozen segments of a modality, in order."""


def frozen_chains(plan: Plan) -> Chains:
    """The longest frozen prefix of each modality over all stages."""
    frozen = {name for stage in plan.stages for name in stage.frozen}
    return {m: [name for name in prefix_chain(plan.model, m) if name in frozen] for m in plan.model.modalities}


def read_sample(path: Path, plan: Plan) -> dict[str, Tensor]:
    """The first 64 training examples of a device's data file, by modality.

    Raises DataError for a file that is no .npz, lacks a modality, or holds what the model cannot take.
    """
    found = {}
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is no .npz file; give a file with arrays such as train_image, written by numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for encoder in plan.model.encoders:
                name = f"train_{encoder.modality}"
                if name not in arrays:
                    raise DataError(f"{path} has no array {name}; it has {sorted(arrays)}")
                values = np.atleast_1d(arrays[name])[:ROWS]
                _check(values, encoder, f"{path}, array {name}")
                found[encoder.modality] = torch.from_numpy(values)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return found


def random_sample(plan: Plan) -> dict[str, Tensor]:
    """Normal values and random token ids: what there is to measure on where no data is given."""
    specs = tuple(raw_input(encoder) for encoder in plan.model.encoders)
    return dict(zip(plan.model.modalities, example_inputs(plan.model, specs, ROWS), strict=True))


def measure_prefix(
    plan: Plan,
    segments: Mapping[str, nn.Module],
    engine: EngineName,
    programs: Mapping[str, bytes],
    sample: Mapping[str, Tensor],
) -> dict[str, float]:
    """The relative error after each frozen segment, to 6 decimals; empty where the engine's runtime is not installed.

    `segments` have the weights to measure with, `programs` the engine's frozen program of each.
    """
    errors: dict[str, float] = {}
    if not is_installed(engine):
        return errors
    opened: dict[bytes, Run] = {}
    for modality, chain in frozen_chains(plan).items():
        exact = given = sample[modality]
        for name in chain:
            data = programs[name]
            if data not in opened:
                opened[data] = open_program(engine, data, "frozen")
            weights = tuple(value.detach() for value in in_order(segments[name]).values())
            taken = take(weights, segment_precision(plan, name))
            given = _in_pieces(given, plan, lambda piece, run=opened[data], taken=taken: run(taken, (piece,))[0])
            exact = _in_pieces(exact, plan, segments[name])
            errors[name] = round(float((given - exact).norm() / exact.norm()), _DIGITS)
    return errors


def _in_pieces(values: Tensor, plan: Plan, run: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([run(piece) for piece in values.split(plan.training.samples_in_memory)])


def _check(values: np.ndarray, encoder: Encoder | ModuleEncoder, source: str) -> None:  # type: ignore[type-arg]
    spec = raw_input(encoder)
    if values.shape[1:] != spec.shape or values.dtype != np.dtype(spec.dtype) or not len(values):
        raise DataError(
            f"{source} has {len(values)} rows of shape {values.shape[1:]} and dtype {values.dtype}, the model takes rows of "
            f"{spec.shape}, {spec.dtype}"
        )
    if encoder.input.kind == "text_tokens":
        if values.min() < 0 or values.max() >= encoder.input.vocabulary:
            raise DataError(f"{source} has token ids outside of [0, {encoder.input.vocabulary})")
    elif not np.isfinite(values).all():
        raise DataError(f"{source} holds NaN or infinity")
