"""The device's place in a round, kept while it trains: the check-in is repeated long before the place would be given away.

It is sent with Python's own HTTP client, and only in rounds that take longer than a third of the lease: the training
process has no room for more.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_client.job import Heartbeat, Job
from edge_client.progress import Say
from lamina.errors import RoundClosedError

Ask = Callable[[Heartbeat], dict[str, Any]]


class Lease:
    def __init__(self, job: Job, say: Say, ask: Ask | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._job, self._say, self._ask, self._clock = job, say, ask or check_in, clock
        self._renew_at = clock() + job.heartbeat.lease_seconds / 3 if job.heartbeat else float("inf")

    def keep(self) -> None:
        """Cheap; to be called after every batch. Raises RoundClosedError when the work is no longer wanted."""
        if self._clock() < self._renew_at:
            return
        assert self._job.heartbeat is not None
        try:
            answer = self._ask(self._job.heartbeat)
        except OSError as error:
            # The work goes on: the coordinator may be back before it is done, and the upload tries for long.
            self._say(f"the coordinator did not answer ({error}); training goes on")
            self._renew_at = self._clock() + self._job.heartbeat.lease_seconds / 3
            return
        if any(answer.get(key) != value for key, value in self._work().items()):
            raise RoundClosedError(f"round {self._job.round} of stage {self._job.stage} went on without this device")
        self._renew_at = self._clock() + float(answer["lease_seconds"]) / 3

    def _work(self) -> dict[str, Any]:
        job = self._job
        return {"kind": "assignment", "phase": job.phase, "run": job.run, "stage": job.stage, "round": job.round}


def check_in(heartbeat: Heartbeat) -> dict[str, Any]:
    """The coordinator's answer. Raises OSError if it does not come, or is none."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    token = json.loads(Path(heartbeat.token_file).read_bytes())["device_token"]
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    try:
        with urlopen(Request(heartbeat.url, heartbeat.body.encode(), headers, method="POST"), timeout=20) as response:
            return dict(json.loads(response.read(1 << 20)))
    except HTTPError as error:
        raise OSError(f"status {error.code}") from error
    except ValueError as error:
        raise OSError(f"an answer that is no JSON: {error}") from error
