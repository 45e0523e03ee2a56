"""The device's place in a round, kept while it works: it checks in again long before the coordinator would give it away."""

from collections.abc import Callable

from lamina.errors import RoundClosedError
from lamina.wire import Assignment, Refused, Wait


class Lease:
    def __init__(
        self, assignment: Assignment, check_in: Callable[[], Assignment | Wait | Refused], clock: Callable[[], float]
    ) -> None:
        self._assignment, self._check_in, self._clock = assignment, check_in, clock
        self._renew_at = clock() + assignment.lease_seconds / 3

    def keep(self) -> None:
        """Cheap; to be called after every batch. Raises RoundClosedError when the work is no longer wanted."""
        if self._clock() < self._renew_at:
            return
        answer = self._check_in()
        if not isinstance(answer, Assignment) or _work(answer) != _work(self._assignment):
            raise RoundClosedError(
                f"round {self._assignment.round} of stage {self._assignment.stage} went on without this device"
            )
        self._renew_at = self._clock() + answer.lease_seconds / 3


def _work(assignment: Assignment) -> Assignment:
    return assignment.model_copy(update={"lease_seconds": 0.0})
