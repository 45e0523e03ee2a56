"""From the command line to the supervisor: this process becomes it, and what it had loaded is gone."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn


def command(options: Mapping[str, Any]) -> list[str]:
    """The supervisor's command line; `options` are those of `edge_client.talk.device.Options`, as JSON can hold them."""
    supervisor = Path(__file__).with_name("supervisor.py")
    return [sys.executable, "-I", "-S", str(supervisor), json.dumps(dict(options))]


def start(options: Mapping[str, Any]) -> NoReturn:
    """Never returns: this process becomes the supervisor."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command(options))
