"""Factories: `package.module:function` -> what the function makes. It is the user's own code, run where lamina exports."""

import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from lamina.errors import ConfigError, CutError, ExportError, LaminaError

_MAX_CAUSES = 10


def call_factory(name: str, arguments: Mapping[str, Any], seed: int = 0) -> object:
    """What the function returns; modules of the current folder can be named as well. The same seed gives the same weights.

    Raises ConfigError for a name that cannot be found, and ExportError with the function's own words if it raises or returns
    nothing.
    """
    function = _find(name)
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with library_errors(f"{name}({given})"):
            made = function(**arguments)
    if made is None:
        raise CutError(f"{name}({given}) returned None: let the function end with `return model`")
    return made


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """What a library or the user's code raises becomes an ExportError with the place and, where one is known, the way out."""
    try:
        yield
    except LaminaError:
        raise
    except (Exception, SystemExit) as error:  # such code may raise anything
        raise ExportError(f"{what} raised {_words(error)}{_last_line(error)}{way_out(error)}") from error


# (what the error or one of its causes says, the way out); the first that is found counts
_WAYS_OUT: tuple[tuple[str, str], ...] = (
    (
        r"torchvision",
        "torchvision and torch are not of one build: `lamina doctor` prints the command that mends it, and docs/doctor.md "
        "(torchvision) has two other ways",
    ),
    (
        r"huggingface\.co|hf\.co|HfHub|LocalEntryNotFound|valid model identifier|offline mode|URLError|ConnectionError",
        "the weights are neither here nor can be fetched: fetch them once where there is a network and give their folder, or "
        "make the model of its configuration, with random weights",
    ),
    (r"(requires|needs) the .* (library|package)|No module named|is not installed", "install the package that it names"),
    (
        r"undefined symbol|cannot open shared object|DLL load failed|operator \S+ does not exist",
        "packages do not fit together: `lamina doctor` looks at the installation and says how to mend it",
    ),
    (r"unexpected keyword argument|missing \d+ required", "`arguments` of the plan file are those of the function"),
    (r"out of memory|can't allocate memory|MemoryError", "make a smaller model, or export on a machine with more memory"),
)


def way_out(error: BaseException) -> str:
    """`; and what to do`, or nothing."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(texts) < _MAX_CAUSES:
        texts.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(texts)
    return next((f"; {words}" for pattern, words in _WAYS_OUT if re.search(pattern, text)), "")


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip(": \n")


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
        raise ConfigError(
            f"factory {name!r}: importing {module_name} needs {error.name or error}, which is not installed; install its "
            f"package{_last_line(error)}{way_out(error)}"
        ) from error
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        raise ExportError(
            f"factory {name!r}: importing {module_name} raised {_words(error)}{_last_line(error)}{way_out(error)}"
        ) from error
    try:
        is_there = hasattr(module, attribute)
    except Exception as error:  # a library may import a part of itself only now
        raise ExportError(
            f"factory {name!r}: {module_name} cannot import {attribute}: {_words(error)}{way_out(error)}"
        ) from error
    if not is_there:
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
