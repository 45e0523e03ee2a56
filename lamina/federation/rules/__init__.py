"""The aggregation rules: one file each, found by being here. `lamina.federation.rules.base` says what a rule is."""

import inspect
from functools import reduce
from importlib import import_module
from operator import or_
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from lamina.federation.rules.base import Rule
from lamina.federation.rules.mean import Mean

_MODULES = [import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__)]
RULES: dict[str, type[Rule]] = {
    kind.model_fields["rule"].default: kind
    for module in _MODULES
    for kind in vars(module).values()
    if inspect.isclass(kind) and issubclass(kind, Rule) and isinstance(kind.model_fields["rule"].default, str)
}
"""Name in a plan -> rule."""

if TYPE_CHECKING:
    AnyRule = Rule
else:
    AnyRule = Annotated[reduce(or_, RULES.values()), Field(discriminator="rule")]

__all__ = ["RULES", "AnyRule", "Mean", "Rule"]
