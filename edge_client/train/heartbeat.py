"""The device's place in a round, kept while it trains: the check-in is repeated long before the place would be given away.

It is sent with Python's own HTTP client, and only in rounds that take longer than a third of the lease: the training
process has no room for more. It never holds training up: an answer that does not come, or is none, costs a line.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_client.job import Heartbeat, Job
from edge_client.progress import Say
from lamina.errors import ConfigError, RoundClosedError
from lamina.net.address import proxy_of, tls_context
from lamina.printable import printable

Ask = Callable[[Heartbeat], Any]
SHORTEST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 6 * 3600.0
_ANSWER_SECONDS = 30.0
_MOST_BYTES = 1 << 19


class Lease:
    def __init__(
        self,
        job: Job,
        say: Say,
        ask: Ask | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_step` is called with every `keep`, and again after a question, which takes time of its own."""
        self._job, self._say, self._ask, self._clock, self._on_step = job, say, ask or check_in, clock, on_step
        self._renew_at = clock() + _pause(job.heartbeat.lease_seconds) if job.heartbeat else float("inf")

    def keep(self) -> None:
        """Cheap; to be called after every batch. Raises RoundClosedError when the work is no longer wanted."""
        self._on_step()
        if self._clock() < self._renew_at:
            return
        assert self._job.heartbeat is not None
        lease_seconds = self._job.heartbeat.lease_seconds
        try:
            lease_seconds = self._renewed(self._ask(self._job.heartbeat))
        except OSError as error:
            # The work goes on: the coordinator may be back before it is done, and the upload tries for long.
            self._say(f"the coordinator did not answer ({printable(str(error))}); training goes on")
        self._renew_at = self._clock() + _pause(lease_seconds)
        self._on_step()

    def _renewed(self, answer: Any) -> float:
        """The seconds of the new lease. Raises OSError for an answer that is none, RoundClosedError for another one."""
        kind = answer.get("kind") if isinstance(answer, dict) else None
        if kind not in ("assignment", "wait", "refused"):
            raise OSError("its answer is not understood")
        if any(answer.get(key) != value for key, value in self._work().items()):
            raise RoundClosedError(f"round {self._job.round} of stage {self._job.stage} went on without this device")
        seconds = answer.get("lease_seconds")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            raise OSError("its answer has no legal lease_seconds")
        return float(min(seconds, 10 * _LONGEST_PAUSE_SECONDS))

    def _work(self) -> dict[str, Any]:
        job = self._job
        return {"kind": "assignment", "phase": job.phase, "run": job.run, "stage": job.stage, "round": job.round}


def _pause(lease_seconds: float) -> float:
    return min(max(lease_seconds / 3, SHORTEST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)


def check_in(heartbeat: Heartbeat) -> Any:
    """The coordinator's answer, of any JSON type. Raises OSError if it does not come within 30 s, or is none.

    The question is asked in a thread, because a peer that sends a byte now and then runs into no time-out of a socket. One
    that does is left to itself: it ends with this process at the latest.
    """
    from threading import Thread

    came: list[Any] = []

    def ask() -> None:
        try:
            came.append(_ask(heartbeat))
        except OSError as error:
            came.append(error)
        except Exception as error:
            came.append(OSError(f"{type(error).__name__}: {error}"))

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    if not came:
        raise OSError(f"no answer within {_ANSWER_SECONDS:.0f} s")
    if isinstance(came[0], OSError):
        raise came[0]
    return came[0]


def _ask(heartbeat: Heartbeat) -> Any:
    from urllib.error import HTTPError
    from urllib.request import HTTPRedirectHandler, HTTPSHandler, ProxyHandler, Request, build_opener

    from lamina.digests import CONTENT_DIGEST, REQUEST_DIGEST, content_digest, request_digest

    class Stays(HTTPRedirectHandler):
        """The request carries the device's token: it goes to the coordinator and to nobody else."""

        def redirect_request(self, *arguments: Any) -> None:
            return None

    try:
        proxy = proxy_of(heartbeat.url)
        scheme = heartbeat.url.partition(":")[0]
        handlers = [Stays(), ProxyHandler({scheme: proxy.url} if proxy else {})]
        if scheme == "https":
            handlers.append(HTTPSHandler(context=tls_context()))
    except ConfigError as error:
        raise OSError(error.message) from error
    token = json.loads(Path(heartbeat.token_file).read_bytes())["device_token"]
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "Accept-Encoding": "identity"}
    question = heartbeat.body.encode()
    headers[CONTENT_DIGEST] = content_digest(question)
    headers[REQUEST_DIGEST] = request_digest("POST", heartbeat.url[heartbeat.url.rindex("/v1/") :], headers)
    try:
        request = Request(heartbeat.url, question, headers, method="POST")
        with build_opener(*handlers).open(request, timeout=20) as response:
            body = response.read(_MOST_BYTES + 1)
            digest = response.headers.get(CONTENT_DIGEST)
    except HTTPError as error:
        error.close()
        raise OSError(f"status {error.code}") from error
    if len(body) > _MOST_BYTES:
        raise OSError(f"an answer of more than {_MOST_BYTES} bytes")
    if digest not in (None, content_digest(body)):
        raise OSError("an answer that was damaged on its way")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise OSError(f"an answer that is no JSON: {error}") from error
