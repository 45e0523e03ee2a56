"""`lamina key`: who signs this machine's bundles, and whose it accepts."""

from pathlib import Path
from typing import Annotated

import typer

key = typer.Typer(
    name="key",
    no_args_is_help=True,
    help="The keys that sign bundles. `lamina export` signs every bundle; coordinators and devices refuse programs that no key "
    "they trust has signed. Keys lie in ~/.config/lamina/keys, or $LAMINA_KEYS.",
)

Name = Annotated[str, typer.Option(help="Name of the key: letters, digits, '.', '_', '-'.")]


@key.command()
def new(name: Name = "default") -> None:
    """Make a key on this machine, and show its public half.

    The first `lamina export` makes one by itself. A key is never overwritten, and its private half never shown. It has no
    password: who can read the file can sign, so only its owner may.
    """
    from lamina.bundles.keys import keys_folder, new_key

    made = new_key(name)
    typer.echo(f"made {keys_folder() / f'{name}.key'}: keep it secret, and keep a copy in a safe place", err=True)
    _show(made.public_key)


@key.command()
def show(name: Name = "default") -> None:
    """Show the public half of a key: for `lamina join --trust` on devices and `lamina serve --trust` on coordinators.

    The fingerprint is for comparing by eye with what a device says when it meets the key for the first time.
    """
    from lamina.bundles.keys import public_key

    _show(public_key(name))


@key.command()
def trust(
    public_key: Annotated[
        str, typer.Argument(metavar="KEY", help="Public key of another exporter, as `lamina key show` prints it there.")
    ],
    name: Annotated[str, typer.Option(help="What to call it in messages, for example whose it is.")] = "",
) -> None:
    """Trust another exporter's key: this user may publish and assemble its bundles, and a coordinator here takes them.

    A running coordinator notices at once. To trust it no longer, delete its entry in trusted.json beside the keys.
    """
    from lamina.bundles.keys import trust_key
    from lamina.bundles.signing import fingerprint

    added = trust_key(public_key, name)
    typer.echo(f"trusted from now on: {fingerprint(added.key)}{f' ({name})' if name else ''}")


@key.command(name="list")
def list_() -> None:
    """Show this machine's own keys and those of others that are trusted, with their fingerprints."""
    from lamina.bundles.keys import keys_folder, own_keys, trusted_keys
    from lamina.bundles.signing import fingerprint, key_text

    own, others = own_keys(), trusted_keys().names
    for public, name in own.items():
        typer.echo(f"own      {fingerprint(public)}  {key_text(public)}  {name}")
    for public, name in others.items():
        typer.echo(f"trusted  {fingerprint(public)}  {key_text(public)}  {name}".rstrip())
    if not own and not others:
        typer.echo(f"no keys in {keys_folder()}; `lamina key new` makes one")


@key.command()
def sign(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle whose content you vouch for.")],
    name: Name = "default",
) -> None:
    """Sign a bundle that another key signed, or that nobody did, such as one from an older lamina.

    Every blob is verified first, but not who wrote it: what you sign, all who trust you will run.
    """
    from lamina.bundles.bundle import manifest_bytes, read_blobs, sign_bundle
    from lamina.bundles.keys import load_key
    from lamina.bundles.manifest import Manifest
    from lamina.bundles.signing import fingerprint

    signer = load_key(name)
    manifest = manifest_bytes(bundle)
    read_blobs(bundle, Manifest.from_json(manifest, str(bundle)))
    signature = sign_bundle(bundle, signer, manifest)
    typer.echo(f"{bundle} is signed by key {fingerprint(signature.public_key)} ({name})")


def _show(public: str) -> None:
    from lamina.bundles.signing import fingerprint, key_text

    typer.echo(key_text(public))
    typer.echo(f"fingerprint: {fingerprint(public)}")
