"""The coordinator of `lamina serve`, with a wall clock that somebody sets: real time plus the seconds in a file.

python -m benchmarks.chaos.coordinator STATE PORT OFFSET_FILE
"""

import logging
import sys
import time
from pathlib import Path

from coordinator.serve import serve
from coordinator.settings import Settings
from lamina.errors import LaminaError, shown


def main() -> None:
    state, port, offset_file = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = Settings(state=state, port=port, wait_seconds_min=0.1, wait_seconds_max=0.3)
    try:
        serve(settings, clock=lambda: time.time() + float(offset_file.read_text()))
    except LaminaError as error:
        sys.stderr.write(shown(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
