"""`lamina assemble`: turn trained weights into a model to deploy."""

from pathlib import Path
from typing import Annotated

import typer

from lamina.cli.progress import telling


def assemble(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle that was trained.")],
    weights: Annotated[Path, typer.Option(help="Folder with one <segment>.safetensors each, as `lamina pull` writes it.")],
    out: Annotated[Path, typer.Option(help="Folder for the model files.")],
    run_factories: Annotated[
        bool,
        typer.Option(
            "--run-factories",
            help="Call the functions that the plan names to make the model, though another machine's key signed the bundle. "
            "They can do anything that you can: look at them first, in manifest.json.",
        ),
    ] = False,
    allow_unsigned: Annotated[bool, typer.Option("--allow-unsigned", help="Take a bundle that nobody signed.")] = False,
) -> None:
    """Write the trained model for PyTorch, ONNX Runtime and ExecuTorch, weights inside, ready to deploy.

    The three are run on the same random inputs, and the largest difference between them is printed.
    """
    from rich.console import Console

    from lamina import api

    console = Console()
    with telling("verify the bundle, write and compare the model"):
        model = api.assemble(bundle, weights, out, allow_unsigned, run_factories, tell=lambda line: typer.echo(line, err=True))
    for path in (model.safetensors, model.state_dict, model.onnx, model.pte):
        console.print(f"{path}  {path.stat().st_size:,} bytes", soft_wrap=True)
    console.print(f"largest difference of an output between PyTorch and the files: {model.max_difference:.1e}", soft_wrap=True)
