"""Engines by name. A runtime is imported when it is chosen, never before."""

from importlib import import_module

from edge_client.engines.base import Array, Engine, LoadedProgram
from lamina.errors import EngineMissingError
from lamina.names import ENGINES, EngineName

__all__ = ["Array", "Engine", "LoadedProgram", "load_engine"]


def load_engine(name: EngineName) -> Engine:
    """The engine, with its runtime imported and set to one thread. Raises EngineMissingError if it is not installed."""
    if name not in ENGINES:
        raise EngineMissingError(f"there is no engine {name!r}; known: {', '.join(ENGINES)}")
    try:
        engine: Engine = import_module(f"edge_client.engines.{name}").ENGINE()
    except ImportError as error:
        raise EngineMissingError(
            f"engine {name!r} is not installed here ({error}); install it with: pip install 'lamina[{name}]'"
        ) from error
    return engine
