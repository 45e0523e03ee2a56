"""What a distribution requires, read from its metadata, and whether a version satisfies it: the part of PEP 508 that we use.

The base install has no `packaging`, so names, version ranges and markers are read here. Versions compare by their release
numbers; a pre-release counts as older than its release, and a local part (`+cpu`) only where the requirement has one.
"""

import ast
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lamina.errors import ConfigError

_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^]]*\])?\s*\(?([^;)]*)\)?\s*(?:;\s*(.*))?$")
_CLAUSE = re.compile(r"^(===|==|!=|>=|<=|~=|>|<)\s*([0-9A-Za-z][0-9A-Za-z.*+!_-]*)$")
_VERSION_NAMES = ("python_version", "python_full_version", "implementation_version")
_PRE = re.compile(r"^v?(?:\d+!)?(\d+(?:\.\d+)*)[-_.]?((?:a|b|c|rc|alpha|beta|pre|preview|dev)[-_.]?\d*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Requirement:
    """`name` is normalised; `clauses` are (operator, version); `marker` is empty where there is none."""

    name: str
    clauses: tuple[tuple[str, str], ...]
    marker: str

    @property
    def text(self) -> str:
        return self.name + ",".join(operator + version for operator, version in self.clauses)

    def is_met_by(self, version: str) -> bool:
        return all(_holds(version, operator, bound) for operator, bound in self.clauses)

    def applies(self, extra: str, environment: Mapping[str, str] | None = None) -> bool:
        """Whether this machine needs it for an extra; "" is the base install."""
        if not self.marker:
            return not extra
        values = {**(environment or this_environment()), "extra": extra}
        return evaluate(self.marker, values) and not (extra and evaluate(self.marker, {**values, "extra": ""}))

    @property
    def extra(self) -> str:
        """The extra that its marker names; empty for the base install."""
        named = re.search(r"""extra\s*==\s*["']([^"']+)["']""", self.marker)
        return named[1] if named else ""


def parse(text: str) -> Requirement:
    """One line of `Requires-Dist`. Raises ConfigError for what is none."""
    match = _REQUIREMENT.match(text)
    if match is None:
        raise ConfigError(f"{text!r} is no requirement")
    clauses = []
    for part in filter(None, (piece.strip() for piece in match[2].split(","))):
        clause = _CLAUSE.match(part)
        if clause is None:
            raise ConfigError(f"{text!r}: {part!r} is no version range")
        clauses.append((clause[1], clause[2]))
    return Requirement(normalise(match[1]), tuple(clauses), (match[3] or "").strip())


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def this_environment() -> dict[str, str]:
    """The values of marker names on this machine."""
    return {
        "os_name": os.name,
        "sys_platform": sys.platform,
        "platform_machine": platform.machine(),
        "platform_system": platform.system(),
        "platform_release": platform.release(),
        "platform_version": platform.version(),
        "platform_python_implementation": platform.python_implementation(),
        "implementation_name": sys.implementation.name,
        "implementation_version": platform.python_version(),
        "python_version": ".".join(platform.python_version_tuple()[:2]),
        "python_full_version": platform.python_version(),
    }


def evaluate(marker: str, values: Mapping[str, str]) -> bool:
    """A marker's truth. Its grammar is a part of Python's, but versions compare as versions. Raises ConfigError."""
    try:
        return _truth(ast.parse(marker.strip(), mode="eval").body, values)
    except (SyntaxError, KeyError, TypeError) as error:
        raise ConfigError(f"{marker!r} is no marker that can be read: {error}") from error


def _truth(node: ast.expr, values: Mapping[str, str]) -> bool:
    match node:
        case ast.BoolOp(op=ast.And()):
            return all(_truth(value, values) for value in node.values)
        case ast.BoolOp(op=ast.Or()):
            return any(_truth(value, values) for value in node.values)
        case ast.Compare(left=left, ops=[operator], comparators=[right]):
            return _compare(left, operator, right, values)
    raise TypeError(ast.unparse(node))


def _compare(left: ast.expr, operator: ast.cmpop, right: ast.expr, values: Mapping[str, str]) -> bool:
    a, b = (str(side.value) if isinstance(side, ast.Constant) else values[ast.unparse(side)] for side in (left, right))
    is_in = {ast.In: a in b, ast.NotIn: a not in b}.get(type(operator))
    if is_in is not None:
        return is_in
    symbol = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}[type(operator)]
    named = {ast.unparse(side) for side in (left, right)}
    if named & set(_VERSION_NAMES):
        return _holds(a, symbol, b)
    return {"==": a == b, "!=": a != b, "<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[symbol]


def _holds(version: str, operator: str, bound: str) -> bool:
    if operator == "===":
        return version == bound
    if "+" not in bound:
        version = version.partition("+")[0]
    if operator in ("==", "!=") and bound.endswith(".*"):
        head = _key(bound.removesuffix(".*"))[0]
        return (_padded(_key(version)[0], len(head))[: len(head)] == head) == (operator == "==")
    if operator == "~=":
        head = _key(bound)[0][:-1]
        return _order(version, bound) >= 0 and _padded(_key(version)[0], len(head))[: len(head)] == head
    order = _order(version, bound)
    if operator in ("==", "!="):
        same = order == 0 and version.partition("+")[2] == bound.partition("+")[2]
        return same == (operator == "==")
    # A pre-release of the bound itself is below it by number, but it is not what "older than" asks for.
    if operator == "<" and _key(version)[1] and _order(_release(version), _release(bound)) == 0:
        return bool(_key(bound)[1]) and order < 0
    return {">=": order >= 0, "<=": order <= 0, ">": order > 0, "<": order < 0}[operator]


def _order(a: str, b: str) -> int:
    (x, pre_x), (y, pre_y) = _key(a), _key(b)
    width = max(len(x), len(y))
    left, right = (_padded(x, width), _rank(pre_x)), (_padded(y, width), _rank(pre_y))
    return (left > right) - (left < right)


def _rank(pre: str) -> tuple[int, int]:
    letters, digits = re.match(r"([a-z]*)[-_.]?(\d*)", pre).groups() if pre else ("", "")  # type: ignore[union-attr]
    rank = {"dev": 0, "a": 1, "alpha": 1, "b": 2, "beta": 2, "c": 3, "rc": 3, "pre": 3, "preview": 3, "": 4}
    return rank[letters], int(digits or 0)


def _release(version: str) -> str:
    return ".".join(map(str, _key(version)[0]))


def _key(version: str) -> tuple[tuple[int, ...], str]:
    """(release numbers, pre-release in lower case or "")."""
    match = _PRE.match(version.strip())
    if match is None:
        return (), ""
    return tuple(int(part) for part in match[1].split(".")), (match[2] or "").lower()


def _padded(numbers: Sequence[int], width: int) -> tuple[int, ...]:
    return tuple(numbers) + (0,) * (width - len(numbers))
