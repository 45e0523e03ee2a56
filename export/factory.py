"""Factories: `package.module:function` -> what the function makes. It is the user's own code, run where lamina exports."""

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from lamina.errors import ConfigError, ExportError


def call_factory(name: str, arguments: Mapping[str, Any], seed: int = 0) -> object:
    """What the function returns; modules of the current folder can be named as well. The same seed gives the same weights.

    Raises ConfigError for a name that cannot be found, and ExportError with the function's own words if it raises.
    """
    function = _find(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return function(**arguments)
        except Exception as error:  # the user's code may raise anything
            place = _last_line(error)
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            raise ExportError(f"{name}({given}) raised {type(error).__name__}: {error}{place}") from error


def _find(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{name!r} is no factory: write package.module:function, such as my_models:make_vit")
    try:
        with _current_folder_on_path():
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise ConfigError(
                f"factory {name!r}: there is no module {error.name!r}; install its package, or run lamina in the folder that "
                "holds it"
            ) from error
        raise ConfigError(f"factory {name!r}: importing {module_name} needs {error.name}, which is not installed") from error
    except Exception as error:  # a module may raise anything while it is imported
        raise ExportError(
            f"factory {name!r}: importing {module_name} raised {type(error).__name__}: {error}{_last_line(error)}"
        ) from error
    if not hasattr(module, attribute):
        near = get_close_matches(attribute, dir(module), n=1)
        raise ConfigError(
            f"factory {name!r}: {module_name} has no {attribute!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    function = getattr(module, attribute)
    if not callable(function):
        raise ConfigError(
            f"factory {name!r} is a {type(function).__name__}, not a function; make it one that returns the model"
        )
    return function


@contextmanager
def _current_folder_on_path() -> Iterator[None]:
    """As `python -m` does: a user's own file beside the plan can be named."""
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)


def _last_line(error: BaseException) -> str:
    """Where the user's code raised: the innermost frame outside of lamina and torch is enough to find it."""
    frames = []
    trace = error.__traceback__
    while trace:
        code = trace.tb_frame.f_code
        frames.append(f" (at {Path(code.co_filename).name}, line {trace.tb_lineno}, in {code.co_name})")
        trace = trace.tb_next
    return frames[-1] if len(frames) > 1 else ""
