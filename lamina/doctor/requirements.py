"""What a distribution requires, read from its metadata as pip reads it."""

import re
from dataclasses import dataclass

from packaging.markers import Marker
from packaging.requirements import InvalidRequirement
from packaging.requirements import Requirement as Line
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

from lamina.errors import ConfigError


@dataclass(frozen=True)
class Requirement:
    """A package, by its normalised name, the versions of it that will do, and where it is needed."""

    name: str
    versions: SpecifierSet
    marker: Marker | None

    @property
    def text(self) -> str:
        return f"{self.name}{self.versions}"

    def is_met_by(self, version: str) -> bool:
        """Pre-releases count: whoever installed one wanted it."""
        try:
            return self.versions.contains(version, prereleases=True)
        except InvalidVersion:
            return not self.versions

    def applies(self, extra: str) -> bool:
        """Whether this machine needs it for an extra; "" is the base install."""
        if self.marker is None:
            return not extra
        return self.marker.evaluate({"extra": extra}) and not (extra and self.marker.evaluate({"extra": ""}))

    @property
    def extra(self) -> str:
        """The extra that its marker names; empty for the base install."""
        named = re.search(r"""extra\s*==\s*["']([^"']+)["']""", str(self.marker or ""))
        return named[1] if named else ""


def parse(text: str) -> Requirement:
    """One line of `Requires-Dist`. Raises ConfigError for what is none."""
    try:
        line = Line(text)
    except InvalidRequirement as error:
        raise ConfigError(f"{text!r} is no requirement: {error}") from error
    return Requirement(canonicalize_name(line.name), line.specifier, line.marker)
