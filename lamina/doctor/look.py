"""The whole look at an installation: what is quick here, what is heavy in processes beside each other."""

import os
import platform
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lamina import __version__
from lamina.doctor import machine, packages, probes
from lamina.doctor.diagnosis import ROLES, Check, Report, RoleName, make_report
from lamina.doctor.engines import LIBRARIES, check_engines, check_libraries
from lamina.doctor.packages import ROLE_EXTRAS, Installed, Needs
from lamina.errors import ConfigError
from lamina.names import ENGINES, EngineName

SOURCE = Path(__file__).parents[2] / "pyproject.toml"
Tell = Callable[[str], None]


def program_cache() -> Path:
    """As `export.lowering.cache.default_cache`, which cannot be asked without torch."""
    chosen = os.environ.get("LAMINA_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lamina" / "programs"


def look(
    asked: tuple[RoleName, ...],
    compiler: Sequence[str] | None,
    others: Iterable[Check],
    tell: Tell,
    path: Sequence[str] | None = None,
    seconds: float = probes.SECONDS,
) -> Report:
    """Looks at everything. `others` are checks made elsewhere; `path` is where distributions are searched.

    Raises ConfigError for a role that this version of lamina does not have.
    """
    found = packages.installed(path)
    needs = packages.needs_of(found, SOURCE if path is None else None)
    how_to_add = _how_to_add(needs)
    unknown = [role for role in asked if role not in how_to_add]
    if unknown:
        raise ConfigError(f"this version of lamina has no role {unknown[0]!r}; it has: {', '.join(how_to_add)}")
    have = {each.name for each in found}
    with ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1)) as pool:
        tell("loading engines and model libraries in processes of their own")
        loading: dict[EngineName, Future[probes.EngineProbe]] = {
            name: pool.submit(probes.probe_engine, name, seconds) for name in ENGINES
        }
        libraries = pool.submit(probes.probe_modules, _libraries(have), seconds)
        engines = {name: each.result() for name, each in loading.items()}
        faults = libraries.result()

    present = packages.present_roles(found, needs) if needs else []
    if not present or any(probe.folder is not None for probe in engines.values()) or "device" in asked:
        present = ["device", *present]
    shim = engines["executorch"].shim
    checks = [
        *_lamina(needs, found),
        *(_extras(needs, found, present, asked) if needs else ()),
        *packages.check_clashes(found, needs),
        *(packages.check_torch(found, needs) if needs else ()),
        *check_engines(engines, needs),
        *check_libraries(faults, {each.name: each.version for each in found}),
        machine.check_compiler(compiler, bool(shim and shim.fault)),
        machine.check_memory(),
        *others,
    ]
    return make_report(needs.version if needs else __version__, platform.python_version(), checks, present, how_to_add, asked)


def _lamina(needs: Needs | None, found: list[Installed]) -> list[Check]:
    if needs is None:
        return [
            Check(
                name="lamina",
                state="fault",
                found=f"{__version__}, without metadata: what it requires is unknown",
                remedy="pip install --force-reinstall --no-deps lamina",
                roles=ROLES,
            )
        ]
    state, remedy = ("warning", f"pip install --no-deps -e {SOURCE.parent}") if needs.note else ("ok", "")
    own = Check(
        name="lamina",
        state="warning" if state == "warning" else "ok",
        found=needs.version + (f"; {needs.note}" if needs.note else ""),
        remedy=remedy,
    )
    return [machine.check_python(needs.requires_python), own]


def _extras(needs: Needs, found: list[Installed], present: Sequence[RoleName], asked: Sequence[RoleName]) -> list[Check]:
    checks = [packages.check_extra("base packages", needs.by_extra[""], found, ROLES, must=True)]
    for role, extra in ROLE_EXTRAS.items():
        if extra in needs.by_extra:
            must = role in present or role in asked
            checks.append(packages.check_extra(f"{role} packages", needs.by_extra[extra], found, (role,), must=must))
    if "export-executorch" in needs.by_extra and "exporter" in present:
        wanted = needs.by_extra["export-executorch"]
        own = [each for each in wanted if each.name not in {one.name for one in needs.by_extra["export"]}]
        checks.append(packages.check_extra("export for executorch", own, found, (), must=False))
    if "zstd" in needs.by_extra:
        checks.append(packages.check_extra("compressed transfers", needs.by_extra["zstd"], found, (), must=False))
    return checks


def _how_to_add(needs: Needs | None) -> dict[RoleName, str]:
    """Role -> the command that installs it, for the roles of this version."""
    found: dict[RoleName, str] = {"device": "lamina engine add executorch"}
    for role, extra in ROLE_EXTRAS.items():
        if needs and extra in needs.by_extra:
            found[role] = f"pip install 'lamina[{extra}]'"
    return found


def _libraries(have: set[str]) -> list[str]:
    """What is imported, in one process: transformers looks for torchvision when a model is named."""
    if "torch" not in have:
        return []
    return [name + (":ViTModel" if name == "transformers" else "") for name in LIBRARIES if name in have]
