"""The requests of split training, with the patience and the counting of every other request."""

from typing import Literal

from edge_client.talk.transport import Transport
from lamina.net.connection import parsed, parsed_one_of, path_of
from lamina.split.wire import SPLIT_ANSWER, SplitAccepted, SplitCheckIn, SplitEvaluation, SplitReport, SplitWork
from lamina.wire import REPORT_HEADER, Refused, Wait

_BYTES = {"Content-Type": "application/octet-stream"}


class SplitTransport(Transport):
    def split_check_in(self, message: SplitCheckIn) -> SplitWork | Wait | Refused:
        return parsed_one_of(SPLIT_ANSWER, self._send("check-in", "POST", "/v1/split/check-in", message.to_json()))

    def half_step(
        self,
        kind: Literal["features", "gradients"],
        run: str,
        round: int,
        step: int,
        examples: int,
        body: bytes,
        most_bytes: int,
    ) -> bytes:
        """Sends activations and gets features, or sends gradients and gets gradients, at most `most_bytes`; repeating is
        harmless."""
        path = f"{_round(run, round)}/steps/{step}/{kind}?examples={examples}"
        return self._send(f"{kind} of step {step}", "POST", path, body, _BYTES, most_bytes=most_bytes).content

    def answers(self, run: str, round: int, examples: int, body: bytes, most_bytes: int) -> bytes:
        path = f"{_round(run, round)}/answers?examples={examples}"
        return self._send("activations of test data", "POST", path, body, _BYTES, most_bytes=most_bytes).content

    def put_split_update(self, run: str, round: int, body: bytes, report: SplitReport) -> SplitAccepted:
        headers = {**_BYTES, REPORT_HEADER: report.model_dump_json()}
        return parsed(SplitAccepted, self._send("upload of the update", "PUT", f"{_round(run, round)}/update", body, headers))

    def put_split_evaluation(self, run: str, round: int, evaluation: SplitEvaluation) -> SplitAccepted:
        path = f"{_round(run, round)}/evaluation"
        return parsed(SplitAccepted, self._send("upload of the evaluation", "PUT", path, evaluation.to_json()))


def _round(run: str, round: int) -> str:
    return path_of("v1", "split", "runs", run, "rounds", round)
