"""`lamina doctor`: whether this machine, or a model, is ready, and how to mend what is not."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamina.cli.progress import telling
from lamina.errors import ConfigError
from lamina.names import ENGINES, EngineName

if TYPE_CHECKING:
    from rich.console import Console

    from export.faults.survey import Finding
    from lamina.doctor import Check, Report
    from lamina.doctor.diagnosis import RoleName
    from lamina.plans.plan import Plan

_ANY_CLASSES = 10
_COLOURS = {"ok": "green", "usable": "green", "warning": "yellow", "fault": "red", "faulty": "red", "absent": "dim"}


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[PLAN_OR_FACTORY]",
            help="A plan file, or package.module:function that makes a model: look at its layers instead of the installation.",
        ),
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option(
            help="What this machine is to be: device, coordinator, exporter, bench or data. Repeat it for more than one. "
            "Default: the roles whose packages are installed."
        ),
    ] = None,
    state: Annotated[
        list[Path] | None,
        typer.Option(help="State folder of a device or a coordinator, to see whether it can be written; may be repeated."),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="With a model: engine to look at, executorch, onnxruntime or torch. Repeat it for more than one. "
            "Default: executorch and onnxruntime."
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write what was found as JSON as well.")] = None,
) -> None:
    """Check this installation, or the layers of a model, and say how to mend what is wrong.

    Without an argument: Python, packages against the versions that lamina is tested with, packages that overwrite each
    other, engines (each is loaded in a process of its own), compiler, folders, disk, memory and sensors. Changes nothing.
    Ends with status 1 if a role of this machine cannot be used.

    With a plan file or a factory: traces every different layer forward and backward, and tells for each engine whether it can
    train the layer and run it frozen, and if not, why and what to do. Takes seconds where an export takes minutes. Ends with
    status 1 if the plan cannot be exported.
    """
    if model is None:
        if engine:
            raise ConfigError("--engine is for a model: lamina doctor PLAN_OR_FACTORY --engine ...; for all, leave it out")
        _installation(role or [], state or [], json)
    else:
        if role or state:
            raise ConfigError("--role and --state are for the installation: lamina doctor without a model")
        _model(model, engine or ["executorch", "onnxruntime"], json)


def _installation(asked: list[str], states: list[Path], file: Path | None) -> None:
    from rich.console import Console

    from edge_client.engines.executorch_runtime import find_compiler
    from lamina.doctor.diagnosis import ROLES
    from lamina.doctor.look import look

    roles = tuple(known for known in ROLES if known in asked)
    unknown = [name for name in asked if name not in ROLES]
    if unknown:
        raise ConfigError(f"there is no role {unknown[0]!r}; known: {', '.join(ROLES)}")
    with telling("looking") as tell:
        others = [*_folder_checks(states), _sensor_check()]
        report = look(roles, find_compiler(), others, tell)
    _show_report(report, Console(highlight=False))
    _write(file, report.to_json())
    if report.has_fault:
        raise typer.Exit(1)


def _folder_checks(states: list[Path]) -> "list[Check]":
    from edge_client.engines.executorch_runtime import engines_folder
    from lamina.bundles.keys import keys_folder
    from lamina.doctor import Check
    from lamina.doctor.look import program_cache
    from lamina.doctor.machine import check_cache, check_folder

    wanted: list[tuple[str, Callable[[], Path], str, tuple[RoleName, ...]]] = [
        ("program cache", program_cache, "$LAMINA_CACHE", ("exporter",)),
        ("engines", engines_folder, "$LAMINA_ENGINES", ("device",)),
        ("keys", keys_folder, "$LAMINA_KEYS", ("exporter",)),
        *((f"state {folder}", lambda folder=folder: folder, "--state", ("device", "coordinator")) for folder in states),
    ]
    checks = []
    for name, find, variable, roles in wanted:
        try:
            checks.append(check_folder(name, find(), variable, roles))
            if name == "program cache":
                checks.append(check_cache(find()))
        except (RuntimeError, ConfigError) as error:  # a user without a home folder
            remedy = f"set {variable} to a folder"
            checks.append(Check(name=f"{name} folder", state="fault", found=str(error), remedy=remedy, roles=roles))
    return checks


def _sensor_check() -> "Check":
    """Whether `lamina bench` can measure energy here."""
    from benchmarks.device.power import Sensors
    from lamina.doctor import Check

    with Sensors() as sensors:
        notes = sensors.notes
    if notes.startswith("no energy: "):
        return Check(name="energy sensors", state="absent", found=notes.removeprefix("no energy: "))
    return Check(name="energy sensors", state="ok", found=notes)


def _show_report(report: "Report", console: "Console") -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=f"lamina {report.lamina} on Python {report.python}", box=box.SIMPLE, pad_edge=False)
    for heading in ("check", "state", "found"):
        table.add_column(heading, overflow="fold")
    for check in report.checks:
        table.add_row(check.name, _coloured(check.state), _plain(check.found))
    table.add_section()
    for role in report.roles:
        asked = ", asked for" if role.name in report.asked and role.state == "absent" else ""
        table.add_row(f"role {role.name}", _coloured(role.state), asked.removeprefix(", "))
    console.print(table)
    mend: dict[tuple[str, str], list[str]] = {}
    for check in report.checks:
        if check.state in ("fault", "warning"):
            mend.setdefault((check.state, check.remedy), []).append(check.name)
    for role in report.roles:
        if role.state == "absent" and role.name in report.asked:
            mend.setdefault(("fault", role.remedy), []).append(f"role {role.name}")
    for (state, remedy), names in sorted(mend.items()):
        # One line each, however long: it is there to be copied.
        console.print(f"{_coloured(state)} {_plain(', '.join(names))}: {_plain(remedy)}", soft_wrap=True)
    faulty = [role.name for role in report.roles if role.name in report.asked and role.state != "usable"]
    usable = [role.name for role in report.roles if role.state == "usable"]
    console.print(f"usable as: {', '.join(usable) or 'nothing'}" + (f"; not as: {', '.join(faulty)}" if faulty else ""))


def _model(source: str, chosen: Sequence[str], file: Path | None) -> None:
    import os

    from rich.console import Console

    from export.faults.survey import examine
    from export.plans.resolve import is_factory, resolve

    unknown = [name for name in chosen if name not in ENGINES]
    if unknown:
        raise ConfigError(f"unknown engine {unknown[0]!r}; known: {', '.join(ENGINES)}")
    engines: tuple[EngineName, ...] = tuple(name for name in ENGINES if name in chosen)
    # While a layer is traced, the standard error itself is silent (`export.ops.quiet`).
    with os.fdopen(os.dup(2), "w") as screen, telling(f"reading {source}", Console(file=screen)) as tell:
        # A factory says nothing of the objective. Its layers are the same with any, and this one fits any modalities.
        resolved = resolve(source, {"classes": _ANY_CLASSES} if is_factory(source) else None, check=False)

        def show(segment: str, done: int, total: int) -> None:
            tell(f"tracing {segment} ({done} of {total} different segments)")

        findings = examine(resolved.plan, resolved.model, engines, show, resolved.faults)
    _show_findings(findings, resolved.plan, Console(highlight=False))
    _write(file, _findings_json(findings, resolved.plan))
    if any(finding.blocks(resolved.plan) for finding in findings):
        raise typer.Exit(1)


def _show_findings(findings: "Sequence[Finding]", plan: "Plan", console: "Console") -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=f"{plan.name}: {plan.strategy}, {len(plan.stages)} stages", box=box.SIMPLE, pad_edge=False)
    for heading in ("segment", "like it", "engine", "trains", "runs frozen"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "like it" else "left")
    for finding in findings:
        frozen = "-" if finding.runs_frozen is None else _yes(finding.runs_frozen)
        alike = str(len(finding.like)) if finding.like else ""
        table.add_row(_plain(finding.segment), alike, finding.engine, _yes(finding.trains), frozen)
    console.print(table)
    told: dict[tuple[str, tuple[str, ...], str, str], list[str]] = {}
    for finding in findings:
        if finding.reason:
            told.setdefault((finding.segment, finding.like, finding.reason, finding.remedy), []).append(finding.engine)
    for (segment, like, reason, remedy), engines in told.items():
        all_of_them = segment + (f" and {', '.join(like)}" if like else "")
        console.print(f"[bold]{_plain(all_of_them)}[/bold] ({', '.join(engines)}): {_plain(reason)}", soft_wrap=True)
        console.print(f"  remedy: {_plain(remedy)}", soft_wrap=True)
    blocked = list(dict.fromkeys(finding.engine for finding in findings if finding.blocks(plan)))
    fine = [name for name in dict.fromkeys(finding.engine for finding in findings) if name not in blocked]
    if fine:
        console.print(f"the plan can be exported for: {', '.join(fine)}")
    if blocked:
        console.print(f"the plan cannot be exported for: {', '.join(blocked)}")


def _findings_json(findings: "Sequence[Finding]", plan: "Plan") -> bytes:
    from dataclasses import asdict
    from json import dumps

    rows = [asdict(finding) | {"blocks": finding.blocks(plan)} for finding in findings]
    return (dumps({"plan": plan.name, "findings": rows}, indent=1) + "\n").encode()


def _write(file: Path | None, data: bytes) -> None:
    from lamina.files import write_durably

    if file is not None:
        try:
            write_durably(file, data)
        except OSError as error:
            raise ConfigError(f"{file} cannot be written: {error.strerror}; give another file") from error


def _yes(value: bool) -> str:
    return _coloured("ok").replace("ok", "yes") if value else _coloured("fault").replace("fault", "no")


def _coloured(state: str) -> str:
    return f"[{_COLOURS[state]}]{state}[/]"


def _plain(text: str) -> str:
    """Brackets in paths and messages are no colours."""
    from rich.markup import escape

    return escape(text)
