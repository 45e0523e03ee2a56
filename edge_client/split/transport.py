"""The requests of split training, with the patience and the counting of every other request."""

from typing import Literal

from pydantic import ValidationError

from edge_client.transport import Transport
from lamina.errors import ConfigError, ProtocolError
from lamina.split_wire import SPLIT_ANSWER, SplitAccepted, SplitCheckIn, SplitEvaluation, SplitReport, SplitWork
from lamina.wire import REPORT_HEADER, Refused, Wait

_BYTES = {"Content-Type": "application/octet-stream"}


class SplitTransport(Transport):
    def split_check_in(self, message: SplitCheckIn) -> SplitWork | Wait | Refused:
        response = self._send("check-in", "POST", "/v1/split/check-in", message.to_json())
        try:
            return SPLIT_ANSWER.validate_json(response.content)
        except ValidationError as error:
            raise ProtocolError(f"the coordinator's answer to a check-in is not understood: {error}") from error

    def half_step(
        self, kind: Literal["features", "gradients"], run: str, round: int, step: int, examples: int, body: bytes
    ) -> bytes:
        """Sends activations and gets features, or sends gradients and gets gradients; repeating is harmless."""
        path = f"{_round(run, round)}/steps/{step}/{kind}?examples={examples}"
        return self._send(f"{kind} of step {step}", "POST", path, body, _BYTES).content

    def answers(self, run: str, round: int, examples: int, body: bytes) -> bytes:
        path = f"{_round(run, round)}/answers?examples={examples}"
        return self._send("activations of test data", "POST", path, body, _BYTES).content

    def put_split_update(self, run: str, round: int, body: bytes, report: SplitReport) -> SplitAccepted:
        headers = {**_BYTES, REPORT_HEADER: report.model_dump_json()}
        return _accepted(self._send("upload of the update", "PUT", f"{_round(run, round)}/update", body, headers).content)

    def put_split_evaluation(self, run: str, round: int, evaluation: SplitEvaluation) -> SplitAccepted:
        path = f"{_round(run, round)}/evaluation"
        return _accepted(self._send("upload of the evaluation", "PUT", path, evaluation.to_json()).content)


def _round(run: str, round: int) -> str:
    return f"/v1/split/runs/{run}/rounds/{round}"


def _accepted(content: bytes) -> SplitAccepted:
    try:
        return SplitAccepted.from_json(content, "the coordinator's answer")
    except ConfigError as error:
        raise ProtocolError(error.message) from error
