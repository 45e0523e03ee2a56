"""Tables of a bundle: what each stage costs a device, and the plan as a picture."""

from rich import box
from rich.console import Console
from rich.table import Table

from lamina.bundles.manifest import Manifest
from lamina.figures.overview import Overview, overview, plan_picture
from lamina.printable import printable_markup

_MOST_CHARACTERS = 1000
_MANY_STAGES = 40  # a picture wider than this is no picture


def show_bundle(manifest: Manifest, digest: str, console: Console) -> Overview:
    """Prints everything that a user would ask of a bundle; gives the same as a record."""
    found = overview(manifest, digest)
    console.print(_cost_table(manifest, found))
    console.print(_device_table(found))
    if len(manifest.plan.stages) <= _MANY_STAGES:
        console.print(_picture(manifest))
    if found.rewrites:
        console.print(_rewrites(found))
    for note in found.notes:
        console.print(f"note: {printable_markup(note, _MOST_CHARACTERS)}", soft_wrap=True)
    for engine, errors in manifest.prefix_errors.items():
        console.print(
            f"int8 prefix on {engine}: features off by {100 * max(errors.values()):.2f} % at most, measured on the initial "
            f"weights and {printable_markup(_measured_on(manifest))}",
            soft_wrap=True,
        )
    console.print(
        f"{len(manifest.programs)} program files, {found.program_bytes:,} bytes; bundle {found.bundle_bytes:,} bytes in all",
        soft_wrap=True,
    )
    return found


def _measured_on(manifest: Manifest) -> str:
    what = manifest.prefix_errors_on
    return what if " " in what else f"data {what[:12]}"


def _cost_table(manifest: Manifest, found: Overview) -> Table:
    training = manifest.plan.training
    pieces = f" in micro-batches of {training.micro_batch}" if training.samples_in_memory < training.batch_size else ""
    table = Table(
        title=f"{printable_markup(found.name)}: {manifest.plan.strategy}, batch {training.batch_size}{pieces}",
        caption="stage (rounds); params and MFLOPs: active/frozen, a trained segment costs\n"
        "3 forward passes, a frozen one 1; KiB: down/up",
        box=box.SIMPLE,
        pad_edge=False,
    )
    headings = ("stage", "modality", "active", "frozen", "1000\nparams", "MFLOPs\n/sample", "KiB\n/round")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in found.stages:
        for row in stage.modalities:
            is_first = row is stage.modalities[0]
            table.add_row(
                f"{stage.index} ({stage.rounds})" if is_first else "",
                row.modality,
                _layers(row.active),
                _layers(row.frozen),
                _pair(row.active_parameters / 1e3, row.frozen_parameters / 1e3),
                _pair(row.training_flops_per_sample / 1e6, row.prefix_flops_per_sample / 1e6),
                _pair(row.round_bytes_down / 1024, row.round_bytes_up / 1024),
                end_section=row is stage.modalities[-1],
            )
    return table


def _pair(one: float, two: float) -> str:
    return "/".join(f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in (one, two))


def _layers(names: tuple[str, ...]) -> str:
    """`stem+0-3`: the part of a chain that a modality's segments are."""
    numbers = sorted(int(name.rsplit(".", 1)[1]) for name in names if ".layers." in name)
    parts = ["stem"] if any(name.endswith(".stem") for name in names) else []
    if numbers:
        parts.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return "+".join(parts) or "-"


def _device_table(found: Overview) -> Table:
    table = Table(
        title="on the device",
        caption="planned: all that a micro-batch needs; disk: programs and weights;\nfeatures: stored for one example",
        box=box.SIMPLE,
        pad_edge=False,
    )
    for heading in ("stage", "engine", "MiB\nplanned", "KiB\nnew programs", "MiB\ndisk", "KiB\nfeatures"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in found.stages:
        for engine in found.engines:
            table.add_row(
                str(stage.index) if engine == found.engines[0] else "",
                engine,
                f"{stage.planned_bytes[engine] / 2**20:.1f}",
                f"{stage.program_bytes[engine] / 1024:.0f}",
                f"{stage.disk_bytes[engine] / 2**20:.2f}",
                f"{stage.feature_bytes_per_sample / 1024:.1f}",
            )
    return table


def _picture(manifest: Manifest) -> Table:
    table = Table(caption="A active, f frozen, . not there yet", box=None, pad_edge=False, min_width=40)
    table.add_column("segment")
    table.add_column("".join(str(stage.index % 10) for stage in manifest.plan.stages))
    for name, letters in plan_picture(manifest):
        table.add_row(printable_markup(name), letters.replace("A", "[bold green]A[/]").replace("f", "[blue]f[/]"))
    return table


def _rewrites(found: Overview) -> Table:
    table = Table(title="rewritten, each compared with the original", box=box.SIMPLE, pad_edge=False)
    for heading in ("where", "what", "times", "largest difference", ""):
        table.add_column(heading)
    for each in found.rewrites:
        where, kind, note = (printable_markup(text, _MOST_CHARACTERS) for text in (each.where, each.kind, each.note))
        table.add_row(where, kind, str(each.count), f"{each.largest_difference:.1e}", note)
    return table
