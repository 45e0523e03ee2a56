"""The program cache: lowered programs on disk, so that a repeated or interrupted export goes on where it was.

An entry is addressed by all that its bytes depend on: the graph with shapes and dtypes, the engine, the versions of the
compilers, and the format numbers of our lowering. Any number of processes may use one folder: files are renamed into place
whole, and two processes that make the same entry make the same one. To clear the cache, delete the folder.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from export.lowering.worker import LoweredProgram
from lamina.encoding.tensors import hash_bytes
from lamina.files import write_durably


def default_cache() -> Path:
    """`$LAMINA_CACHE`, else `~/.cache/lamina/programs`."""
    chosen = os.environ.get("LAMINA_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lamina" / "programs"


def program_key(graph_text: str, engine: str, versions: Mapping[str, str]) -> str:
    """The address of a program in the cache."""
    return hash_bytes(json.dumps([graph_text, engine, dict(versions)], sort_keys=True).encode())


class ProgramCache:
    """Key -> lowered program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> LoweredProgram | None:
        """The program, or None if it is not there or not whole."""
        try:
            about = json.loads((self.folder / f"{key}.json").read_bytes())
            data = (self.folder / f"{key}.program").read_bytes()
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        if hash_bytes(data) != about.get("sha256"):
            return None
        return LoweredProgram(data, about["arena_bytes"])

    def put(self, key: str, program: LoweredProgram) -> None:
        """Stores a program that passed its parity check; the description comes last, so an entry with it is whole."""
        write_durably(self.folder / f"{key}.program", program.data)
        about = {"sha256": hash_bytes(program.data), "arena_bytes": program.arena_bytes}
        write_durably(self.folder / f"{key}.json", json.dumps(about).encode())
