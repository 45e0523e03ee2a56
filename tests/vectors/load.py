"""The one reader of the vectors that tests/vectors/index.json lists."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def load(name: str) -> Any:
    """A JSON vector by its name in the index."""
    index = json.loads((FOLDER / "index.json").read_text())
    return json.loads((FOLDER / index[name]["file"]).read_text())
