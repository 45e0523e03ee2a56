"""Packages: which roles are installed, at which versions, and what stands in each other's way.

Nothing is imported: versions and requirements are those in the metadata of the installed distributions, and what lamina needs
is what its own metadata says.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.utils import canonicalize_name

from lamina.doctor.diagnosis import Check, RoleName, State
from lamina.doctor.requirements import Requirement, parse

ROLE_EXTRAS: dict[RoleName, str] = {"coordinator": "coordinator", "exporter": "export", "bench": "bench", "data": "data"}
ENGINE_EXTRAS = ("executorch", "onnxruntime", "torch")
# Engines come without what they declare: a device imports none of it.
_NO_DEPS = ("executorch", "onnxruntime", "onnxruntime-training-cpu", "torchvision", "timm")
_SHARED_FOLDERS = ("onnxruntime", "torch", "torchvision", "executorch", "numpy")
"""Import packages that several distributions are known to bring: they would overwrite each other's files."""


@dataclass(frozen=True)
class Installed:
    """A distribution of this environment; `requires` as in its metadata, `packages` are the shared folders that it fills."""

    name: str
    version: str
    requires: tuple[str, ...]
    requires_python: str
    packages: tuple[str, ...]
    folder: Path


def installed(path: Sequence[str] | None = None) -> list[Installed]:
    """All distributions on a search path (None: that of this Python), without importing any of them."""
    found = distributions() if path is None else distributions(path=list(path))
    return [described for described in map(_describe, found) if described is not None]


def _describe(distribution: Distribution) -> Installed | None:
    name = distribution.metadata["Name"]
    if not name:  # the rest of an interrupted installation
        return None
    name = canonicalize_name(name)
    is_shared = any(name == folder or name.startswith((f"{folder}-", f"{folder}_")) for folder in _SHARED_FOLDERS)
    files = {str(file) for file in distribution.files or ()} if is_shared else set()
    return Installed(
        name=name,
        version=distribution.version or "0",
        requires=tuple(distribution.requires or ()),
        requires_python=distribution.metadata["Requires-Python"] or "",
        packages=tuple(folder for folder in _SHARED_FOLDERS if f"{folder}/__init__.py" in files),
        folder=Path(str(distribution.locate_file(""))),
    )


@dataclass(frozen=True)
class Needs:
    """What lamina requires: (extra, or "" for the base install) -> requirements that apply to this machine."""

    version: str
    requires_python: Requirement
    by_extra: Mapping[str, tuple[Requirement, ...]]
    note: str = ""

    def pin(self, package: str) -> Requirement | None:
        """The first requirement of a package, of any extra."""
        return next((each for wanted in self.by_extra.values() for each in wanted if each.name == package), None)


def needs_of(found: Iterable[Installed], source: Path | None) -> Needs | None:
    """What lamina's installed metadata says; where it is not installed, `source`, the pyproject.toml beside it."""
    own = next((each for each in found if each.name == "lamina"), None)
    declared = _declared(source) if source and source.is_file() else None
    if own is None:
        if declared is None:
            return None
        version, python, lines = declared
        return _needs(version, python, lines, f"lamina runs from {source.parent if source else ''} and is not installed")
    note = ""
    if declared is not None and _same(declared[2]) != _same(own.requires):
        note = f"the metadata of the installed lamina is older than {source}"
    return _needs(own.version, own.requires_python, own.requires, note)


def _needs(version: str, python: str, lines: Iterable[str], note: str) -> Needs:
    requirements = [parse(line) for line in lines]
    extras = ["", *dict.fromkeys(each.extra for each in requirements if each.extra and each.extra != "dev")]
    by_extra = {extra: tuple(each for each in requirements if each.applies(extra)) for extra in extras}
    return Needs(version, parse(f"python {python}"), by_extra, note)


def _declared(source: Path) -> tuple[str, str, list[str]] | None:
    """(version, requires-python, lines as in metadata) of a pyproject.toml."""
    project = tomllib.loads(source.read_text(encoding="utf-8")).get("project", {})
    if project.get("name") != "lamina":
        return None
    lines = list(project.get("dependencies", ()))
    for extra, wanted in project.get("optional-dependencies", {}).items():
        for line in wanted:
            name, _, marker = line.partition(";")
            lines.append(f'{name}; ({marker.strip()}) and extra == "{extra}"' if marker else f'{name}; extra == "{extra}"')
    return project.get("version", "0"), project.get("requires-python", ""), lines


def _same(lines: Iterable[str]) -> set[tuple[str, str, str]]:
    """Requirements in a form that does not depend on how a build tool writes them."""
    return {(each.name, str(each.versions), each.extra) for each in map(parse, lines)}


def present_roles(found: Iterable[Installed], needs: Needs) -> list[RoleName]:
    """Roles of which a package is here that nothing else of lamina asks for."""
    names = {each.name for each in found}
    present: list[RoleName] = []
    for role, extra in ROLE_EXTRAS.items():
        own = {each.name for each in needs.by_extra.get(extra, ())}
        # The extras of the same role, such as export-executorch, ask for the same packages.
        others = [wanted for other, wanted in needs.by_extra.items() if other != extra and not other.startswith(f"{extra}-")]
        own -= {each.name for wanted in others for each in wanted}
        if own & names:
            present.append(role)
    return present


def check_extra(
    label: str, wanted: Sequence[Requirement], found: Iterable[Installed], roles: tuple[RoleName, ...], *, must: bool
) -> Check:
    """Whether an extra's packages are here at the right versions. Without `must`, nothing being there is no fault."""
    have = {each.name: each.version for each in found}
    lacking = [each for each in wanted if each.name not in have]
    wrong = [each for each in wanted if each.name in have and not each.is_met_by(have[each.name])]
    right = [f"{each.name} {have[each.name]}" for each in wanted if each.name in have and each not in wrong]
    if not must and len(lacking) == len(wanted):
        return Check(name=label, state="absent", found="not installed", remedy=install(wanted))
    parts = [f"{each.name} {have[each.name]}, but {each.text} is needed" for each in wrong]
    parts += [f"{each.name} is missing" for each in lacking]
    bad = bool(wrong) or (must and bool(lacking))
    state: State = "fault" if bad else "warning" if lacking else "ok"
    remedy = install([*wrong, *lacking]) if wrong or lacking else ""
    return Check(name=label, state=state, found="; ".join([*parts, *right]), remedy=remedy, roles=roles)


def install(wanted: Iterable[Requirement]) -> str:
    """The pip command for some requirements; packages whose declared dependencies would do harm come without them."""
    wanted = list(wanted)
    alone = [each for each in wanted if each.name in _NO_DEPS]
    rest = [each for each in wanted if each not in alone]
    commands = []
    if rest:
        commands.append("pip install " + " ".join(f"'{each.text}'" for each in rest))
    if alone:
        commands.append("pip install --no-deps " + " ".join(f"'{each.text}'" for each in alone))
    return " && ".join(commands)


def check_clashes(found: Iterable[Installed], needs: Needs | None) -> list[Check]:
    """Distributions that fill the same folder, and distributions that are here twice."""
    found = list(found)
    checks = []
    for folder in _SHARED_FOLDERS:
        owners = sorted({each.name for each in found if folder in each.packages})
        if len(owners) < 2:
            continue
        pins = [needs.pin(name) for name in owners] if needs else []
        keep = next((pin.text for pin in pins if pin), owners[-1])
        checks.append(
            Check(
                name=f"packages that fill {folder}/",
                state="fault",
                found=f"{' and '.join(owners)} are installed together and overwrite each other's files",
                remedy=f"pip uninstall -y {' '.join(owners)} && pip install --no-deps '{keep}'",
                roles=("device", "exporter"),
            )
        )
    versions: dict[str, set[tuple[str, Path]]] = {}
    for each in found:
        versions.setdefault(each.name, set()).add((each.version, each.folder))
    for name, several in versions.items():
        numbers = sorted({version for version, _ in several})
        same_folder = len({folder for _, folder in several}) < len(several)
        if len(numbers) > 1 and same_folder:
            checks.append(
                Check(
                    name=f"{name} twice",
                    state="warning",
                    found=f"versions {', '.join(numbers)} of {name} lie in one folder, left by an interrupted installation",
                    remedy=f"pip install --force-reinstall --no-deps {name}",
                )
            )
    if not checks:
        checks.append(Check(name="clashing packages", state="ok", found="none"))
    return checks


def check_torch(found: Iterable[Installed], needs: Needs) -> list[Check]:
    """torch's pin and build, and whether torchvision is the one for this torch."""
    have = {each.name: each for each in found}
    torch = have.get("torch")
    if torch is None:
        return []
    pin = needs.pin("torch")
    build = build_of(torch)
    checks = []
    if pin and not pin.is_met_by(torch.version):
        checks.append(
            Check(
                name="torch",
                state="fault",
                found=f"{torch.version}, {build}; lamina is tested with {pin.text} alone",
                remedy=f"pip install '{pin.text}'",
                roles=("exporter",),
            )
        )
    else:
        checks.append(Check(name="torch", state="ok", found=f"{torch.version}, {build}"))
    vision = have.get("torchvision")
    if vision is not None:
        wanted = next((each for each in map(parse, vision.requires) if each.name == "torch" and each.versions), None)
        if wanted and not wanted.is_met_by(torch.version):
            checks.append(
                Check(
                    name="torchvision for this torch",
                    state="warning",
                    found=f"torchvision {vision.version} is made for {wanted.text}, and torch is {torch.version}",
                    remedy="install the torchvision of this torch, without letting it change torch: "
                    "pip install --no-deps torchvision==VERSION (torch 2.N goes with torchvision 0.(N+15)), "
                    "or: pip uninstall -y torchvision",
                )
            )
    return checks


def build_of(torch: Installed) -> str:
    """`CPU build` or `CUDA 12.8 build`, from the file that torch reads itself."""
    file = torch.folder / "torch" / "version.py"
    text = file.read_text() if file.is_file() else ""
    found = re.search(r"""^cuda\b[^=]*=\s*['"]([\d.]+)['"]""", text, re.MULTILINE)
    if found:
        return f"CUDA {found[1]} build"
    return "CPU build" if text else "unknown build"
