"""`lamina export`: turn a model into a bundle."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamina.cli.plan_options import (
    BatchSize,
    Classes,
    Devices,
    FreezeStems,
    LayersPerStage,
    LearningRate,
    Rounds,
    Strategy,
    changes,
    check_plan_file,
)
from lamina.cli.progress import counting, telling
from lamina.errors import ConfigError
from lamina.names import ENGINES

if TYPE_CHECKING:
    from export.plans.resolve import Resolved
    from lamina.names import EngineName

_MIB = 1 << 20


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PLAN|FACTORY",
            help="Plan file (.toml, .yaml, .json), or the function that makes the model, as package.module:function.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the bundle; empty, or holding this very bundle.")],
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="Engines to export for, separated by commas: executorch, onnxruntime, torch. Default: executorch,onnxruntime."
        ),
    ] = None,
    strategy: Strategy = None,
    layers_per_stage: LayersPerStage = None,
    rounds: Rounds = None,
    learning_rate: LearningRate = None,
    classes: Classes = None,
    freeze_stems: FreezeStems = False,
    batch_size: BatchSize = None,
    devices: Devices = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Examples in memory at a time. Default: the batch.")] = None,
    precision: Annotated[str | None, typer.Option(help="Weights of frozen layers on the device: fp32 (default), int8.")] = None,
    memory_mb: Annotated[
        float | None,
        typer.Option(help="Choose micro-batch and layers per stage so that a device stays below so many MiB, by prediction."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of random weights and of the order of examples.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Programs to lower at the same time, about 1 GB of memory each. Default: one per core."),
    ] = None,
    sample: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Data file as devices have it. For a plan with an int8 prefix, its first 64 training examples show how far "
            "int8 moves the features of the initial weights; without it, random inputs do. Changes no program.",
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures of the tables to this file.")] = None,
) -> None:
    """Write the programs and weights of a model as a signed bundle, and show what each stage costs a device.

    The model is the built-in family (a plan file alone) or your own: timm and Hugging Face transformers, or any module with
    stem, layers, norm and pool. docs/export.md walks through it. Options replace what the plan file says.

    Every program is run once and compared with PyTorch before it is written. Lowered programs are kept in
    ~/.cache/lamina/programs (or $LAMINA_CACHE): a repeated or interrupted export traces the stages again, which is the short
    part, and lowers only what is not there yet.
    """
    check_plan_file(source)
    from rich.console import Console

    from export.build import export_bundle
    from export.plans.resolve import resolve
    from lamina.bundles.bundle import bundle_digest
    from lamina.cli.overview_tables import show_bundle

    engines = _engines(engine or ["executorch,onnxruntime"])
    wanted = changes(
        strategy=strategy,
        layers_per_stage=layers_per_stage,
        rounds=rounds,
        learning_rate=learning_rate,
        classes=classes,
        freeze_stems=freeze_stems,
        devices=devices,
        seed=seed,
        training={"batch_size": batch_size, "micro_batch": micro_batch, "prefix_precision": precision},
    )
    with telling(f"making the model of {source}"):
        resolved = resolve(source, wanted)
    if memory_mb is not None:
        resolved = _fitted(resolved, engines, memory_mb)
    with counting("trace", "lower") as show:
        manifest = export_bundle(
            resolved.plan,
            out,
            engines,
            model=resolved.model,
            notes=resolved.notes,
            rewrites=resolved.rewrites,
            on_progress=show,
            workers=jobs,
            sample=sample,
        )
    digest = bundle_digest(out)
    found = show_bundle(manifest, digest, Console())
    typer.echo(f"{out}: manifest {digest[:12]}; look at it again with `lamina inspect {out}`")
    if json is not None:
        json.write_bytes(found.to_json())


def _engines(given: list[str]) -> "list[EngineName]":
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in ENGINES]
    if unknown or not names:
        raise ConfigError(f"unknown engine {(unknown or [''])[0]!r}; known: {', '.join(ENGINES)}")
    return [engine for name in dict.fromkeys(names) for engine in ENGINES if engine == name]


def _fitted(resolved: "Resolved", engines: "list[EngineName]", memory_mb: float) -> "Resolved":
    """The plan with the first settings that fit every engine; each engine can only make them smaller."""
    from dataclasses import replace

    from benchmarks.device.job_alone import base_peaks
    from export.fit.fit import Base, fits

    plan = resolved.plan
    for engine in engines:
        typer.echo(f"predicting memory on {engine}", err=True)
        plan = next(fits(plan, engine, Base(**base_peaks(engine)), int(memory_mb * _MIB))).plan
    chosen = plan.training
    typer.echo(f"within {memory_mb:g} MiB: micro-batch {chosen.samples_in_memory}, {len(plan.stages)} stages", err=True)
    return replace(resolved, plan=plan)
