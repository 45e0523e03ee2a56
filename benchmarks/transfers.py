"""How many bytes does a round move each way, in each encoding, with and without zstd, and what does that cost in CPU time?

Question   Bytes per device and round for `vit12` (`benchmarks.device.workloads`): one layer-wise stage against end to end.
Method     The tensor files that coordinator and device exchange, with real values: down, the weights of the active segments,
           one file for each segment; up, one file with the difference after 20 AdamW steps (eager PyTorch, made-up frames
           whose classes differ). As on the wire, int8 updates round at random, and a compressed file is used only where it is
           smaller. CPU time is that of one process with one thread, median of the repeats; compressing is part of encoding,
           decompressing of decoding. `relative_error` is |decoded - exact| / |exact| over all tensors (Euclidean norms).
Not shown  HTTP headers, manifest and programs (once per run); a segment of the frozen prefix, which a device fetches once, when
           it is frozen; what rounding does to accuracy.

    python -m benchmarks.transfers [--repeats N]
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.device.workloads import CLASSES, LAYERS, PATCH_VALUES, TOKENS, WORKLOADS, one_stage_plan
from benchmarks.results_file import write_results
from export.models.models import build_model
from lamina.encoding.compression import Compression, compress, decompress
from lamina.encoding.tensors import ENCODINGS, Encoding, Float32, decode_file, encode, max_file_bytes
from lamina.plans.plan import Plan
from lamina.plans.segments import TensorSpec

STEPS, BATCH, EXAMPLES = 20, 16, 64
Tensors = dict[str, Float32]


def train(plan: Plan) -> tuple[dict[str, Tensors], Tensors]:
    """The active segments' weights after some steps, by segment, and the difference to their start, `segment/tensor`."""
    (stage,) = plan.stages
    torch.manual_seed(plan.seed)
    model = build_model(plan.model, plan.seed)
    segments = model.segments()
    # Layers above the active one are not part of the model yet.
    (encoder,) = model.encoders.values()
    encoder.layers = encoder.layers[: sum(".layers." in name for name in (*stage.frozen, *stage.active))]
    parameters = {f"{name}/{key}": value for name in stage.active for key, value in segments[name].named_parameters()}
    model.requires_grad_(False)
    for value in parameters.values():
        value.requires_grad_(True)
    start = {name: value.detach().clone() for name, value in parameters.items()}

    means = torch.randn(CLASSES, 1, PATCH_VALUES)
    labels = torch.randint(0, CLASSES, (EXAMPLES,))
    frames = means[labels] + torch.randn(EXAMPLES, TOKENS, PATCH_VALUES)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    for step in range(STEPS):
        batch = slice(step * BATCH % EXAMPLES, step * BATCH % EXAMPLES + BATCH)
        optimizer.zero_grad()
        (logits,) = model(frames[batch])
        torch.nn.functional.cross_entropy(logits, labels[batch]).backward()
        optimizer.step()

    weights = {name: {key: value.detach().numpy() for key, value in segments[name].named_parameters()} for name in stage.active}
    return weights, {name: (value.detach() - start[name]).numpy() for name, value in parameters.items()}


def measure(
    files: list[Tensors], encoding: Encoding, compression: Compression, is_random: bool, repeats: int
) -> dict[str, Any]:
    """Bytes, CPU milliseconds and error of sending these tensor files."""
    random = np.random.default_rng(0) if is_random else None
    specs = [[TensorSpec(name=name, shape=value.shape) for name, value in file.items()] for file in files]
    sent: list[tuple[bytes, Compression]] = []
    received: list[Tensors] = []
    encode_seconds, decode_seconds = [], []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tensors"
        for _ in range(repeats):
            begin = time.process_time()
            sent = [send(file, encoding, compression, random) for file in files]
            between = time.process_time()
            received = []
            for (data, how), expected in zip(sent, specs, strict=True):
                path.write_bytes(decompress(data, how, max_file_bytes(expected)))
                received.append(decode_file(str(path), expected))
            encode_seconds.append(between - begin)
            decode_seconds.append(time.process_time() - between)
    exact = np.concatenate([value.ravel() for file in files for value in file.values()]).astype(np.float64)
    found = np.concatenate([value.ravel() for file in received for value in file.values()])
    return {
        "values": exact.size,
        "bytes": sum(len(data) for data, _ in sent),
        "encode_cpu_ms": 1e3 * statistics.median(encode_seconds),
        "decode_cpu_ms": 1e3 * statistics.median(decode_seconds),
        "relative_error": float(np.linalg.norm(found - exact) / np.linalg.norm(exact)),
    }


def send(
    tensors: Tensors, encoding: Encoding, compression: Compression, random: np.random.Generator | None
) -> tuple[bytes, Compression]:
    """What travels, and how it is compressed."""
    plain = encode(tensors, encoding, random)
    packed = compress(plain, compression)
    return (packed, compression) if len(packed) < len(plain) else (plain, "none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    console = Console()

    rows: list[dict[str, Any]] = []
    for graph in ("cut", "full"):
        plan = one_stage_plan(WORKLOADS["vit12"], graph, LAYERS // 2, BATCH)
        console.print(f"{plan.strategy}: {STEPS} training steps (up to a minute), then the transfers")
        weights, difference = train(plan)
        for direction, files in (("down", list(weights.values())), ("up", [difference])):
            for encoding in ENCODINGS:
                for compression in ("none", "zstd"):
                    is_random = direction == "up" and encoding == "int8"
                    measured = measure(files, encoding, compression, is_random, repeats)
                    rows.append(
                        {"strategy": plan.strategy, "direction": direction, "encoding": encoding}
                        | {"compression": compression}
                        | measured
                    )
    table = Table(title="vit12: one device, one round")
    for heading in ("strategy", "direction", "encoding", "zstd", "MB", "of fp32", "encode ms", "decode ms", "error"):
        table.add_column(heading, justify="right")
    for row in rows:
        whole = next(r for r in rows if (r["strategy"], r["direction"]) == (row["strategy"], row["direction"]))
        row["ratio_to_fp32"] = row["bytes"] / whole["bytes"]
        table.add_row(
            row["strategy"],
            row["direction"],
            row["encoding"],
            "yes" if row["compression"] == "zstd" else "no",
            f"{row['bytes'] / 1e6:.3f}",
            f"{row['ratio_to_fp32']:.3f}",
            f"{row['encode_cpu_ms']:.1f}",
            f"{row['decode_cpu_ms']:.1f}",
            f"{row['relative_error']:.1e}",
        )
    console.print(table)
    path = write_results("transfers", "python -m benchmarks.transfers", rows, repeats=repeats, steps=STEPS)
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
