"""Lowering a graph to a torch program (`.pt2`): the forward graph, which the torch engine differentiates itself.

One file therefore serves `train` and `eval`.
"""

import warnings
from io import BytesIO

import torch
from torch.export import ExportedProgram

FORMAT = 2  # raise it when this file changes what it writes: cached programs of the old number are then not used


def lower_torch(program: ExportedProgram) -> bytes:
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, buffer)
    return buffer.getvalue()
