"""What became of a job: one small JSON file in the work folder, written by the trainer, or by the supervisor if it died.

trained     num_examples, loss, train_seconds, peak_bytes, update_crc; the update is the file beside it, with this CRC-32
evaluated   num_examples, correct, loss
again       reason: the job has to be prepared anew
error       code, message: an error of `lamina.errors`
died        how: the signal or the status that ended the trainer
"""

import json
from pathlib import Path
from typing import Any

from edge_client.process.supervisor import OUTCOME
from lamina.files import write_durably

JOB, FAILURES = "job.json", "failures.json"
UPDATE, PACKED = "update.safetensors", "update.safetensors.zst"


def write_outcome(folder: Path, kind: str, **values: Any) -> None:
    write_durably(folder / OUTCOME, json.dumps({"kind": kind, **values}).encode())


def read_outcome(folder: Path) -> dict[str, Any] | None:
    """The outcome of the job in this folder; None if it was not finished, or not written whole."""
    try:
        return dict(json.loads((folder / OUTCOME).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
