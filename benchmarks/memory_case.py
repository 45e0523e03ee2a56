"""One case of the memory benchmark, in a process of its own: a few training steps, then the kernel's word on the peak.

    python -m benchmarks.memory_case CASE.json      prints one line of JSON

Engine cases import what a device imports and nothing else; eager cases import torch.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.memory import peak_bytes
from lamina.manifest import Program
from lamina.plan import SGD, AdamW

STEPS = 4


def run_engine(case: dict[str, Any]) -> list[float]:
    """Steps of a program whose last `case["trained"]` weights are trained; CPU seconds of each step."""
    from edge_client.engines import load_engine
    from edge_client.optimizers import make_optimizer

    program = Program.from_json(json.dumps(case["program"]))
    engine = load_engine(program.engine)
    sizes = [int(np.prod(shape)) for shape in program.weights]
    rng = np.random.default_rng(0)
    vector = (0.05 * rng.standard_normal(sum(sizes), np.float32)).astype(np.float32)
    pieces = np.split(vector, np.cumsum(sizes)[:-1])
    weights = [piece.reshape(shape) for piece, shape in zip(pieces, program.weights, strict=True)]
    trained = sum(sizes[len(sizes) - case["trained"] :])
    parameters, gradient = vector[len(vector) - trained :], np.zeros(trained, np.float32)
    optimizer = make_optimizer(_optimizer(case), trained, 1e-3)
    x = rng.standard_normal((program.max_batch, *program.inputs[0].shape), np.float32)
    label = rng.integers(0, case["classes"], program.max_batch)
    loaded = engine.load(Path(case["file"]), program)
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        gradient.fill(0)
        at = 0
        for part in loaded.run([*weights, x, label])[2:]:
            gradient[at : at + part.size] += part.ravel()
            at += part.size
        assert at == trained, f"the program gave {at} gradient values for {trained} trained parameters"
        optimizer.step(parameters, gradient)
        seconds.append(time.process_time() - start)
    return seconds


def run_eager(case: dict[str, Any]) -> list[float]:
    """The same steps in eager PyTorch: all trained, all but the last block flagged frozen, or the last block alone."""
    import torch

    from export.models import build_model
    from export.objectives import apply_objective
    from lamina.model import ModelDescription

    torch.set_num_threads(1)
    description = ModelDescription.from_json(json.dumps(case["model"]))
    model = build_model(description, 0)
    (spec,) = description.encoders
    encoder = model.encoders[spec.modality]
    if case["kind"] != "full":
        for part in (encoder.stem, *encoder.layers[:-1]):
            part.requires_grad_(False)
    if case["kind"] == "cut":
        encoder.stem, encoder.layers = None, encoder.layers[-1:]
    settings = _optimizer(case)
    trained = [value for value in model.parameters() if value.requires_grad]
    if isinstance(settings, AdamW):
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=1e-3)
    else:
        optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=settings.momentum)
    shape = (spec.input.tokens, spec.width) if case["kind"] == "cut" else spec.input.shape
    x, label = torch.randn(case["batch"], *shape), torch.randint(0, case["classes"], (case["batch"],))
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        optimizer.zero_grad()
        z = x if encoder.stem is None else encoder.stem(x)
        for block in encoder.layers:
            z = block(z)
        z = model.projections[spec.modality](encoder.norm(z).mean(dim=1))
        loss, _ = apply_objective(description.objective, model.head, [z], label)
        loss.backward()
        optimizer.step()
        seconds.append(time.process_time() - start)
    return seconds


def _optimizer(case: dict[str, Any]) -> SGD | AdamW:
    return AdamW() if case["optimizer"] == "adamw" else SGD(momentum=0.9)


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text())
    seconds = run_eager(case) if case["side"] == "eager" else run_engine(case)
    print(json.dumps({"peak_bytes": peak_bytes(), "cpu_seconds_per_step": sorted(seconds[1:])[len(seconds[1:]) // 2]}))


if __name__ == "__main__":
    main()
