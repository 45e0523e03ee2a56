"""Options that replace keys of a plan file, or give those that a factory alone lacks; several commands have them."""

from pathlib import Path
from typing import Annotated, Any

import typer

Strategy = Annotated[
    str | None, typer.Option(help="layerwise (default), progressive or end_to_end: the rule that makes the stages.")
]
LayersPerStage = Annotated[int | None, typer.Option(min=1, help="Layers that each stage adds. Default: 1.")]
Rounds = Annotated[int | None, typer.Option(min=1, help="Rounds in all, spread over the stages. Default: 12.")]
LearningRate = Annotated[float | None, typer.Option(help="Learning rate of every stage. Default: 0.001.")]
Classes = Annotated[
    int | None, typer.Option(min=2, help="Classes to tell apart. Without them, two modalities are trained to match.")
]
FreezeStems = Annotated[
    bool, typer.Option("--freeze-stems", help="Never train stems: embedding tables stay as the factory made them.")
]
Devices = Annotated[int | None, typer.Option(min=1, help="Devices in a round. Default: 4.")]
BatchSize = Annotated[int | None, typer.Option(min=2, help="Examples in a training step. Default: 32.")]


def check_plan_file(source: str) -> None:
    """Raises ConfigError for a plan file with a fault, before anything is imported that takes seconds. A factory passes."""
    from lamina.plans.recipe import SUFFIXES, read_recipe

    path = Path(source)
    if path.suffix in SUFFIXES:
        read_recipe(path)


def changes(
    *, training: dict[str, Any] | None = None, devices: int | None = None, freeze_stems: bool = False, **keys: Any
) -> dict[str, Any]:
    """What `export.plans.resolve.resolve` is to replace; options that were not given are left out."""
    given = {key: value for key, value in (training or {}).items() if value is not None}
    found = {key: value for key, value in keys.items() if value is not None}
    if given:
        found["training"] = given
    if devices is not None:
        found["cohort"] = {"size": devices}
    if freeze_stems:
        found["freeze_stems"] = True
    return found
