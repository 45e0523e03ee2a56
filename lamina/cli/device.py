"""`lamina device`: the devices of a coordinator."""

from pathlib import Path
from typing import Annotated

import typer

device = typer.Typer(
    name="device",
    no_args_is_help=True,
    help="The devices that joined a coordinator: list, remove, rename. These commands need the admin token. For example: "
    "lamina device remove http://127.0.0.1:8763 kitchen-pi --token-file admin.token",
)

Url = Annotated[str, typer.Argument(help="Address of the coordinator, e.g. http://127.0.0.1:8763.")]
Name = Annotated[str, typer.Argument(help="Name of the device, as `lamina device list` shows it.")]
TokenFile = Annotated[
    Path | None,
    typer.Option(help="File with the admin token; without it, the environment variable LAMINA_TOKEN is read."),
]


@device.command(name="list")
def list_(
    url: Url,
    token_file: TokenFile = None,
    json: Annotated[bool, typer.Option("--json", help="Print the coordinator's answer as JSON.")] = False,
) -> None:
    """Show every device: which run it works for, with which engine, and when it last asked for work."""
    from lamina.client import Client, read_token

    with Client(url, read_token(token_file)) as client:
        devices = client.devices()
    if json:
        typer.echo(devices.to_json(), nl=False)
        return
    for entry in devices.devices:
        seen = "never asked for work" if entry.seen_seconds_ago is None else f"asked {entry.seen_seconds_ago:.0f} s ago"
        what = [entry.engine or "", "calibrator" if entry.role == "calibrator" else "", entry.run, seen]
        typer.echo(f"{entry.name}  {', '.join(part for part in what if part)}  ({entry.device_id})")
    if not devices.devices:
        typer.echo("no device has joined yet; `lamina join` on a device does it")


@device.command()
def remove(url: Url, name: Name, token_file: TokenFile = None) -> None:
    """Remove a device: its token is dead at once, and its name is free.

    Its places in open rounds go to others. What was accepted of it stays and counts. The same machine may join again, with the
    enrolment token, when `identity.json` is deleted from its state folder.
    """
    from lamina.client import Client, read_token

    with Client(url, read_token(token_file)) as client:
        client.remove_device(name)
    typer.echo(f"{name} is removed, and the name is free")


@device.command()
def rename(
    url: Url,
    name: Name,
    new_name: Annotated[str, typer.Argument(help="1 to 64 of letters, digits, '.', '_', '-'; no other device has it.")],
    token_file: TokenFile = None,
) -> None:
    """Call a device otherwise, at the coordinator alone: the device itself goes on with its old `--name`."""
    from lamina.client import Client, read_token

    with Client(url, read_token(token_file)) as client:
        client.rename_device(name, new_name)
    typer.echo(f"{name} is called {new_name} from now on")
