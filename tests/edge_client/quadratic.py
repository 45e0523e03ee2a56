"""A model whose programs are plain formulas, for tests of what the device does around them.

Weights `part.0/w` (3,), `part.0/v` (2, 2) and `part.1/w` (40000,), more than one piece of a vector. The loss of a batch `x`
(batch, 1) is the mean over its samples of 1/2 |w - x|^2 over all weights, so the gradient of each weight is w - mean(x).
"""

import numpy as np

from edge_client.job import ProgramFile, ReferenceFile, Rows, SegmentFile, Tensor
from edge_client.train.stage_model import StageModel
from lamina.encoding.tensors import encode
from tests.edge_client.tiny import make_job

SEGMENTS = {"part.0": {"w": (3,), "v": (2, 2)}, "part.1": {"w": (40000,)}}
SHAPES = tuple(shape for tensors in SEGMENTS.values() for shape in tensors.values())
COUNTS = [int(np.prod(shape)) for shape in SHAPES]
STARTS = np.cumsum([0, *COUNTS])
NAMES = [f"{segment}/{tensor}" for segment, tensors in SEGMENTS.items() for tensor in tensors]


class Quadratic:
    """Opens programs; `given` has copies of what they were run with."""

    def __init__(self):
        self.given = []

    def open(self, program):
        self.program = program
        return self

    def run(self, arrays):
        self.given.append([array.copy() for array in arrays])
        weights, x = arrays[: len(SHAPES)], arrays[-1]
        gradients = [weight - x.mean(dtype=np.float32) for weight in weights]
        loss = np.mean([sum(0.5 * np.sum((weight - value) ** 2) for weight in weights) for value in x[:, 0]])
        outputs = [np.float32(loss), np.int64(0)]
        return [np.asarray(value) for value in outputs] + (gradients if self.program.role == "train" else [])

    def close(self):
        pass


def program(role="train", references=(), second=False):
    inputs = (Tensor("x", (1,)), *((Tensor("x_second", (1,)),) if second else ()))
    kinds = tuple(ReferenceFile(kind, tuple(tensors)) for kind, tensors in references)
    return ProgramFile("", role, role, SHAPES, inputs, 8, references=kinds)


def weights(seed=0):
    random = np.random.default_rng(seed)
    return {
        segment: {tensor: random.normal(size=shape).astype(np.float32) for tensor, shape in tensors.items()}
        for segment, tensors in SEGMENTS.items()
    }


def flat(values):
    return np.concatenate([value.reshape(-1) for tensors in values.values() for value in tensors.values()])


def segment_files(folder, values):
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for segment, tensors in values.items():
        (folder / segment).write_bytes(encode(tensors))
        specs = tuple(Tensor(name, value.shape) for name, value in tensors.items())
        files.append(SegmentFile(segment, str(folder / segment), specs))
    return tuple(files)


def start(folder, references=(), values=None, second=False, **options):
    """A loaded model, and its engine."""
    engine = Quadratic()
    files = segment_files(folder / "start", values or weights())
    programs = {"train": program(references=references, second=second)}
    model = StageModel("stage 0, round 0", files, programs, {}, 8, engine.open, **options)
    model.load_weights()
    return model, engine


class Numbers:
    """Rows of one number: `values[i]` for example i."""

    def __init__(self, values):
        self.values = np.asarray(values, np.float32)

    def __len__(self):
        return len(self.values)

    def take(self, indices):
        return self.values[np.asarray(indices)].reshape(-1, 1)


def job(folder, **changes):
    facts = {"active": segment_files(folder / "start", weights()), "examples": 16, "kept_folder": str(folder / "kept")}
    return make_job(**(facts | changes))


def no_rows():
    return Rows("", 0, "", (0, 0, 0))
