"""A Python class that yields examples as dicts: {modality: array, pillow image, path or text, "label": 3}, perhaps "split"."""

import importlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lamina.data.faults import Faults
from lamina.data.items import Item
from lamina.errors import DataError
from lamina.plans.model import FACTORY, ModelDescription

NAME = re.compile(FACTORY)
_OTHER = ("label", "split", "group", "id")


class ClassSource:
    """Calls the class or function without arguments, or takes the object as it is; goes over it once."""

    def __init__(self, name: str, model: ModelDescription, names: Mapping[str, str]) -> None:
        """`name` is `package.module:Name`, looked up in the current folder too. Raises DataError."""
        if not NAME.fullmatch(name):
            raise DataError(f"{name!r} is no Python name; write package.module:Name")
        module, attribute = name.split(":")
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.insert(0, here)
        try:
            found = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise DataError(f"{name}: there is no module {error.name!r}; run in the folder that holds it") from error
        except AttributeError as error:
            raise DataError(f"{name}: {error}") from error
        self._name, self._examples = name, found() if callable(found) and not hasattr(found, "__next__") else found
        self._names = {modality: names.get(modality, modality) for modality in model.modalities}
        self._has_length = hasattr(self._examples, "__len__")
        self._by_index = hasattr(self._examples, "__getitem__") and self._has_length
        if not (self._by_index or hasattr(self._examples, "__iter__")):
            raise DataError(
                f"{name} gives a {type(self._examples).__name__}, which has neither __iter__ nor __len__ and __getitem__"
            )

    @property
    def words(self) -> str:
        return f"Python class {self._name}"

    @property
    def labels(self) -> Counter[str] | None:
        return None

    def count(self) -> int | None:
        return len(self._examples) if self._has_length else None

    def items(self, faults: Faults) -> Iterator[Item]:
        for index, example in enumerate(self._each(faults)):
            name = f"{self._name}[{index}]"
            if isinstance(example, Exception):
                faults.add(name, f"the class raised {type(example).__name__}: {example}", items_left_out=1)
                continue
            if not isinstance(example, Mapping):
                faults.add(name, f"is a {type(example).__name__}; expected a dict such as {{'label': 0}}", items_left_out=1)
                continue
            lacking = [own for own in self._names.values() if own not in example]
            if lacking:
                faults.add(name, f"has no {lacking[0]!r}, it has {', '.join(map(str, example))}", items_left_out=1)
                continue
            values = {modality: example[own] for modality, own in self._names.items()}
            split, group, key = (None if example.get(k) is None else str(example[k]) for k in _OTHER[1:])
            yield Item(name, values, example.get("label"), split, group, key)

    def _each(self, faults: Faults) -> Iterator[Any]:
        """Examples by index go on after one that raises; a generator is finished by its exception."""
        if self._by_index:
            for index in range(len(self._examples)):
                try:
                    yield self._examples[index]
                except Exception as error:  # the user's own code; what it raises is a fault of this example
                    yield error
            return
        examples, index = iter(self._examples), 0
        while True:
            try:
                example = next(examples)
            except StopIteration:
                return
            except Exception as error:  # as above
                faults.add(f"{self._name}[{index}]", f"the class raised {type(error).__name__}: {error}; nothing follows it")
                return
            yield example
            index += 1
