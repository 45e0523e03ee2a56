"""What a check says, and what follows for the roles of this machine."""

from collections.abc import Iterable
from typing import Literal, get_args

from lamina.record import Record

State = Literal["ok", "warning", "fault", "absent"]
"""`absent`: not installed, and nothing that is installed needs it."""
RoleName = Literal["device", "coordinator", "exporter", "bench", "data"]
ROLES: tuple[RoleName, ...] = get_args(RoleName)


class Check(Record):
    """One thing that was looked at. `roles` are those that a fault of it stops; `remedy` is a command, or a sentence."""

    name: str
    state: State
    found: str
    remedy: str = ""
    roles: tuple[RoleName, ...] = ()


class Role(Record):
    """A role of this machine: `absent` if its packages are not installed, `faulty` if one of its checks is a fault."""

    name: RoleName
    state: Literal["usable", "faulty", "absent"]
    remedy: str = ""


class Report(Record):
    """Everything that was found. `asked` are the roles that must be usable."""

    lamina: str
    python: str
    roles: tuple[Role, ...]
    asked: tuple[RoleName, ...]
    checks: tuple[Check, ...]

    @property
    def has_fault(self) -> bool:
        """Whether a role that the user asked for, or has if none was asked for, cannot be used."""
        return any(role.name in self.asked and role.state != "usable" for role in self.roles)


def make_report(
    lamina: str,
    python: str,
    checks: Iterable[Check],
    present: Iterable[RoleName],
    how_to_add: dict[RoleName, str],
    asked: tuple[RoleName, ...] = (),
) -> Report:
    """Judges the roles of `how_to_add` by the checks. Without `asked`, the roles that are `present` must be usable."""
    checks, there = tuple(checks), set(present)
    roles = []
    for name in filter(how_to_add.__contains__, ROLES):
        faults = [check for check in checks if check.state == "fault" and name in check.roles]
        if name not in there:
            roles.append(Role(name=name, state="absent", remedy=how_to_add[name]))
        elif faults:
            roles.append(Role(name=name, state="faulty", remedy=faults[0].remedy))
        else:
            roles.append(Role(name=name, state="usable"))
    wanted = asked or tuple(name for name in ROLES if name in there)
    return Report(lamina=lamina, python=python, roles=tuple(roles), asked=wanted, checks=checks)
