"""`lamina split`: a frozen model split between devices and coordinator, with small adapters trained inside it (M2FedSA)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamina.cli.progress import telling
from lamina.errors import ConfigError
from lamina.names import ENGINES

if TYPE_CHECKING:
    from rich.table import Table

    from lamina.split.wire import SplitRound, SplitStatus

split = typer.Typer(
    name="split",
    no_args_is_help=True,
    help="Train small adapters inside a large frozen model that is split between devices and coordinator: activations go up, "
    "gradients come down (docs/split.md). The coordinator must be started with `lamina serve --split ENGINE`.",
)

Url = Annotated[str, typer.Argument(help="Address of the coordinator, e.g. http://127.0.0.1:8763.")]
AdminToken = Annotated[
    Path | None,
    typer.Option("--token-file", help="File with the admin token; without it, the environment variable LAMINA_TOKEN is read."),
]
_KIB = 1 << 10


@split.command()
def export(
    plan: Annotated[Path, typer.Argument(help="Split plan (.toml); benchmarks/plans/split/m2fedsa.toml is one.")],
    out: Annotated[Path, typer.Option(help="Folder for the bundle; empty, or holding a bundle of this plan.")],
    engine: Annotated[
        list[str] | None,
        typer.Option(help=f"Engine to export for: {', '.join(ENGINES)}. Repeat it for more than one. Default: onnxruntime."),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The frozen backbone: a folder of <segment>.safetensors as `lamina pull` writes it, of a model with the same "
            "encoders. Without it the backbone is random.",
        ),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Programs to lower at the same time. Default: one per core.")] = None,
) -> None:
    """Write the programs and weights of both ends as a signed bundle.

    Every program is run once and compared with PyTorch before it is written.
    """

    from export.split.split import export_split
    from lamina.bundles.bundle import bundle_digest
    from lamina.split.plan import SplitPlan

    wanted = SplitPlan.from_toml(plan)
    with telling("trace") as tell:
        manifest = export_split(
            wanted,
            out,
            _engines(engine or ["onnxruntime"]),
            weights=weights,
            workers=jobs,
            on_progress=lambda phase, done, total: tell(f"{phase}: {done} of {total}"),
        )
    trained = sum(part.parameters for part in manifest.parts if part.name in wanted.trained)
    frozen = sum(part.parameters for part in manifest.parts if part.name in wanted.frozen)
    typer.echo(f"{out}: manifest {bundle_digest(out)[:12]}, {trained:,} trained and {frozen:,} frozen parameters")


@split.command()
def publish(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle, as `lamina split export` wrote it.")],
    url: Url,
    token_file: AdminToken = None,
    allow_unsigned: Annotated[
        bool,
        typer.Option("--allow-unsigned", help="Publish a bundle that nobody signed; the coordinator must allow it too."),
    ] = False,
) -> None:
    """Verify a bundle, send what the coordinator lacks of it, and start a run. Prints the run's name."""
    from lamina.bundles.bundle import MANIFEST, blob_path, check_blob, manifest_bytes, read_signature
    from lamina.bundles.keys import users_trust
    from lamina.client import read_token
    from lamina.encoding.tensors import hash_bytes
    from lamina.split.client import SplitClient
    from lamina.split.manifest import SplitManifest

    data = manifest_bytes(bundle)
    typer.echo(f"{bundle}: {users_trust(allow_unsigned).check(hash_bytes(data), read_signature(bundle))}", err=True)
    manifest = SplitManifest.from_json(data, str(bundle / MANIFEST))
    for digest, size in manifest.blobs.items():
        if not blob_path(bundle, digest).is_file():
            raise ConfigError(f"blob {digest} is missing from {bundle}; export the bundle again")
        check_blob(blob_path(bundle, digest), digest, size)
    with SplitClient(url, read_token(token_file)) as client:
        typer.echo(client.publish_split(bundle, manifest).run)


@split.command()
def join(
    url: Url,
    data: Annotated[
        Path,
        typer.Option(
            help="The user's examples of all modalities: an .npz as `lamina join` takes it. It stays on this machine."
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of this user, unique at the coordinator: letters, digits, '.', '_', '-'.")],
    engine: Annotated[str, typer.Option(help=f"Runtime of this device: {', '.join(ENGINES)}. It must be installed here.")],
    state: Annotated[Path, typer.Option(help="Folder that makes this user the same one after a restart. One for each user.")],
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the enrolment token; without it, LAMINA_TOKEN is read. Only needed the first time."),
    ] = None,
    run: Annotated[str | None, typer.Option(help="Take part in this run only; otherwise in any open split run.")] = None,
    until_finished: Annotated[
        bool, typer.Option("--until-finished", help="Leave when no split run is open any more, after some work was done.")
    ] = False,
    trust: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Public key of the exporter; without it, the first key that is shown is kept."),
    ] = None,
    allow_unsigned: Annotated[bool, typer.Option("--allow-unsigned", help="Run programs that nobody signed.")] = False,
) -> None:
    """Take part as a user: low ends, classifiers and data are here, the rest of the model is at the coordinator.

    What is sent tells something about the data: activations, and gradients that reveal labels (docs/split.md).
    """
    from edge_client.split.user import SplitOptions, join_split
    from edge_client.talk.identity import read_enrolment_token
    from lamina.bundles.signing import key_text, parse_key

    (chosen,) = _engines([engine])
    join_split(
        SplitOptions(
            url=url,
            data=str(data),
            name=name,
            engine=chosen,
            state=str(state),
            run=run,
            until_finished=until_finished,
            trust=tuple(key_text(parse_key(key)) for key in trust or ()),
            allow_unsigned=allow_unsigned,
        ),
        lambda: read_enrolment_token(token_file),
    )


@split.command()
def status(
    url: Url,
    run: Annotated[
        str | None, typer.Argument(help="Name of a run, e.g. split-1; without it, all split runs are shown.")
    ] = None,
    token_file: AdminToken = None,
) -> None:
    """Show the rounds of a split run: losses, accuracy of each modality and of their fusion, bytes of one training step."""
    from rich.console import Console

    from lamina.client import read_token
    from lamina.split.client import SplitClient

    console = Console()
    with SplitClient(url, read_token(token_file)) as client:
        names = (run,) if run else client.split_runs().runs
        for name in names:
            console.print(_table(client.split_run(name)))
    if not names:
        console.print("no split run was published yet; start one with `lamina split publish`")


def _table(found: "SplitStatus") -> "Table":
    from rich.table import Table

    from lamina.cli.device_table import CLOSE, shown

    title = shown(f"{found.run}: {found.name}, {found.state}")
    notes = found.rounds[-1].notes if found.rounds else ()
    caption = shown("; ".join((found.detail, *notes)))
    table = Table(title=title, caption=caption, caption_justify="left", padding=CLOSE)
    modalities = sorted({m for row in found.rounds for each in row.users for m in each.report.loss})
    for heading in ("round", "phase", "users", "fused\nloss", *modalities, "fusion", "KiB\nup", "KiB\ndown"):
        table.add_column(heading, justify="right", overflow="fold")
    for row in found.rounds:
        accuracy = [row.test_accuracy(m) for m in (*modalities, None)]
        table.add_row(
            str(row.round),
            "2" if row.fused else "1",
            str(len(row.users)),
            "" if row.fused_loss is None else f"{row.fused_loss:.4f}",
            *("" if value is None else f"{100 * value:.1f} %" for value in accuracy),
            *(f"{value:.1f}" for value in _step_kib(row)),
        )
    return table


def _step_kib(row: "SplitRound") -> tuple[float, float]:
    """What one training step moves, up and down."""
    steps, traffic = max(1, row.traffic.steps), row.traffic
    up = traffic.features_up_bytes + traffic.gradients_up_bytes
    down = traffic.features_down_bytes + traffic.gradients_down_bytes
    return up / steps / _KIB, down / steps / _KIB


def _engines(given: list[str]) -> list:  # type: ignore[type-arg]
    unknown = [name for name in given if name not in ENGINES]
    if unknown:
        raise ConfigError(f"unknown engine {unknown[0]!r}; known: {', '.join(ENGINES)}")
    return [engine for engine in ENGINES if engine in given]
