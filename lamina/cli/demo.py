"""`lamina demo`: the whole house on this machine, on real data."""

from pathlib import Path
from typing import Annotated

import typer

from lamina.errors import ConfigError


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, the final model, the bundles and the logs.")] = Path(
        "lamina-demo"
    ),
    strategy: Annotated[
        str, typer.Option(help="layerwise (one layer at a time), progressive (one more layer each stage) or end_to_end.")
    ] = "layerwise",
    engines: Annotated[
        str, typer.Option(help="Engines separated by commas, dealt to the devices in turn: executorch, onnxruntime, torch.")
    ] = "executorch,onnxruntime",
    clients: Annotated[int, typer.Option(min=1, max=64, help="Number of devices; each is a process of its own.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in all; stage 0 gets 4 in 9 of them.")] = 18,
    layers_per_stage: Annotated[int, typer.Option(min=1, max=6, help="Encoder layers that each stage attaches.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data split, weights and batch order.")] = 0,
    level: Annotated[str, typer.Option(help="How disturbed the data is: clean, medium or hard.")] = "medium",
    beta: Annotated[float, typer.Option(help="Dirichlet parameter of the label split; smaller is more uneven.")] = 1.0,
    baselines: Annotated[bool, typer.Option(help="Also train each modality alone, to see what fusion brings.")] = True,
) -> None:
    """Train a two-modality transformer layer by layer over several device processes, and write a report.

    AV-Digits (handwritten and spoken digits) is split over the devices; programs are exported; a coordinator and the
    devices run as processes of their own and talk over HTTP on the loopback address. The report is `report.html`,
    `report.png` and `report.json` in the output folder; the final model is there as PyTorch, ONNX and ExecuTorch files.
    """
    from benchmarks.data.av_digits import LEVELS
    from benchmarks.demo.demo import DemoSettings, run_demo
    from benchmarks.demo.plan import LEARNING_RATE
    from lamina.bundles.manifest import ENGINES

    names = tuple(name.strip() for name in engines.split(",") if name.strip())
    for kind, given, known in (
        ("--strategy", (strategy,), tuple(LEARNING_RATE)),
        ("--engines", names or ("",), ENGINES),
        ("--level", (level,), LEVELS),
    ):
        for value in given:
            if value not in known:
                raise ConfigError(f"{kind} {value!r} is not known; known: {', '.join(known)}")
    run_demo(
        DemoSettings(
            out=out,
            strategy=strategy,  # type: ignore[arg-type]
            engines=names,  # type: ignore[arg-type]
            devices=clients,
            rounds=rounds,
            layers_per_stage=layers_per_stage,
            seed=seed,
            level=level,  # type: ignore[arg-type]
            beta=beta,
            with_baselines=baselines,
        )
    )
