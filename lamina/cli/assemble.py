"""`lamina assemble`: turn trained weights into a model to deploy."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamina.cli.progress import telling

if TYPE_CHECKING:
    from lamina.bundles.manifest import Manifest


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

    from export.assemble import assemble as assemble_model
    from export.assemble import attached_model
    from lamina.bundles.bundle import read_bundle
    from lamina.bundles.keys import users_trust
    from lamina.encoding.tensors import decode_file
    from lamina.errors import TensorFileError
    from lamina.plans.segments import segment_names

    console = Console()
    with telling("verify the bundle") as tell:
        manifest = read_bundle(bundle, trust=users_trust(allow_unsigned), tell=lambda line: typer.echo(line, err=True))
        _may_call_factories(bundle, manifest, run_factories)
        values = {}
        for name in segment_names(attached_model(manifest.plan)):
            path = weights / f"{name}.safetensors"
            if not path.is_file():
                raise TensorFileError(f"{path} is missing; `lamina pull` writes one file for each segment")
            values[name] = decode_file(str(path), manifest.segment(name).all_tensors)
        tell("write and compare the model")
        model = assemble_model(manifest, values, out)
    for path in (model.safetensors, model.state_dict, model.onnx, model.pte):
        console.print(f"{path}  {path.stat().st_size:,} bytes", soft_wrap=True)
    console.print(f"largest difference of an output between PyTorch and the files: {model.max_difference:.1e}", soft_wrap=True)


def _may_call_factories(bundle: Path, manifest: "Manifest", is_told: bool) -> None:
    """A trusted key's programs run in an engine; a factory is any function at all. Raises ConfigError for one of others."""
    from lamina.bundles.bundle import read_signature
    from lamina.bundles.keys import own_keys
    from lamina.errors import ConfigError
    from lamina.plans.model import ModuleEncoder

    named = [encoder.factory for encoder in manifest.plan.model.encoders if isinstance(encoder, ModuleEncoder)]
    signature = read_signature(bundle)
    if not named or is_told or (signature is not None and signature.public_key in own_keys()):
        return
    raise ConfigError(
        f"{bundle} was not signed by a key of this machine, and to make its model the function {named[0]} would be called with "
        "the arguments in manifest.json; if that is what you want, pass --run-factories"
    )
