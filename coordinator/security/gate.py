"""Who may enter: the token of each request, and how often one address may enrol devices or come with a wrong token.

The methods are the dependencies of the routes. A valid token passes whatever wrong ones its neighbours come with.
"""

from collections.abc import Callable
from typing import TypeVar

from fastapi import Request

from coordinator.security.throttle import Throttle
from coordinator.security.tokens import Tokens
from coordinator.settings import Settings
from lamina.errors import BusyError, NotEnrolledError

Answer = TypeVar("Answer")


class Gate:
    """Every method raises NotEnrolledError, and BusyError for an address that comes too often."""

    def __init__(self, tokens: Tokens, settings: Settings) -> None:
        self._tokens = tokens
        self._enrolments = Throttle(settings.enrolments_per_minute, settings.enrolment_burst)
        self._failures = Throttle(settings.failures_per_minute, settings.failure_burst)

    def enroller(self, request: Request) -> bool:
        """Whether the newcomer is trusted."""
        is_trusted = self._check(request, self._tokens.require_enrolment)
        if not is_trusted and (seconds := self._enrolments.wait_seconds(_address(request))):
            raise BusyError("this address has enrolled many devices; the next one may enrol a little later", seconds)
        return is_trusted

    def admin(self, request: Request) -> None:
        self._check(request, self._tokens.require_admin)

    def device(self, request: Request) -> str:
        """The id of the device that asks."""
        return self._check(request, self._tokens.require_device)

    def known(self, request: Request) -> None:
        """The admin, or any device."""
        self._check(request, self._tokens.require_any)

    def _check(self, request: Request, check: Callable[[str | None], Answer]) -> Answer:
        try:
            return check(request.headers.get("authorization"))
        except NotEnrolledError:
            if seconds := self._failures.wait_seconds(_address(request)):
                raise BusyError("this address has come with wrong tokens too often; try the right one later", seconds) from None
            raise


def _address(request: Request) -> str:
    return request.client.host if request.client else ""
