"""A coordinator for one device, as a function for httpx.MockTransport: every round is trained, then evaluated."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from lamina.bundles.keys import own_key
from lamina.encoding.tensors import decode_file, encode, hash_bytes
from lamina.wire import Accepted, Assignment, Enrolled, Evaluation, Problem, TrainReport, Wait
from tests.edge_client.tiny import make_segment

ENROLMENT_TOKEN, DEVICE_TOKEN = "enrol-me", "device-token"


class FakeCoordinator:
    """Walks through the plan. `requests` has (method, path) of everything that was asked."""

    def __init__(self, manifest, blobs):
        self.manifest, self.blobs = manifest, dict(blobs)
        self.weights = dict(manifest.initial_weights)
        self.steps = [
            (phase, stage.index, round)
            for stage in manifest.plan.stages
            for round in range(stage.rounds)
            for phase in ("train", "evaluate")
        ]
        self.requests, self.reports, self.updates, self.evaluations = [], [], [], []
        self.lease_seconds = 600.0
        self.signature = own_key().sign(manifest.to_json())

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path, body = request.url.path, request.read()
        self.requests.append((request.method, path))
        enrolling = path == "/v1/devices"
        if request.headers["Authorization"] != f"Bearer {ENROLMENT_TOKEN if enrolling else DEVICE_TOKEN}":
            return problem("not-enrolled", 401, "this token is not known")
        if enrolling:
            return answer(Enrolled(device_id="d1", device_token=DEVICE_TOKEN))
        if path == "/v1/check-in":
            return answer(self.next_work())
        if path.startswith("/v1/blobs/"):
            digest = path.rpartition("/")[2]
            headers = {"ETag": f'"{digest}"', "Content-Length": str(len(self.blobs[digest]))}
            return httpx.Response(200, stream=httpx.ByteStream(self.blobs[digest]), headers=headers)
        if path == f"/v1/manifests/{hash_bytes(self.manifest.to_json())}/signature":
            return answer(self.signature) if self.signature else problem("unknown-name", 404, "there is no signature")
        *_, stage, _, round, what = path.split("/")
        work = ("train" if what == "update" else "evaluate", int(stage), int(round))
        if not self.steps or self.steps[0] != work:
            return problem("round-closed", 409, f"the round waits for {self.steps[:1]}, not for {work}")
        if what == "update":
            self.reports.append(TrainReport.model_validate_json(request.headers["Lamina-Report"]))
            self.updates.append(body)
            self.aggregate(body, int(stage))
        else:
            self.evaluations.append(Evaluation.from_json(body))
        self.steps.pop(0)
        return answer(Accepted(run="r1", stage=int(stage), round=int(round)))

    def next_work(self):
        if not self.steps:
            return Wait(reason="no_run", detail="all runs are finished", wait_seconds_min=1, wait_seconds_max=2)
        phase, stage, round = self.steps[0]
        here = self.manifest.plan.stages[stage]
        return Assignment(
            phase=phase,
            run="r1",
            manifest=hash_bytes(self.manifest.to_json()),
            stage=stage,
            round=round,
            weights={name: self.weights[name] for name in (*here.active, *here.frozen)},
            lease_seconds=self.lease_seconds,
            upload_encoding=self.manifest.plan.training.upload_encoding,
        )

    def aggregate(self, body: bytes, stage: int) -> None:
        with TemporaryDirectory() as folder:
            file = Path(folder) / "tensors"
            file.write_bytes(body)
            update = decode_file(str(file), self.manifest.exchange_specs(stage))
            for name in self.manifest.plan.stages[stage].active:
                specs = make_segment(name).tensors
                file.write_bytes(self.blobs[self.weights[name]])
                tensors = decode_file(str(file), specs)
                data = encode({spec.name: tensors[spec.name] + update[f"{name}/{spec.name}"] for spec in specs})
                self.weights[name] = hash_bytes(data)
                self.blobs[self.weights[name]] = data


def answer(record) -> httpx.Response:
    return httpx.Response(200, content=record.to_json(), headers={"Content-Type": "application/json"})


def problem(code: str, status: int, detail: str, headers: dict[str, str] | None = None) -> httpx.Response:
    body = Problem(code=code, title=code, status=status, detail=detail)
    return httpx.Response(status, content=json.dumps(body.model_dump()).encode(), headers=headers)
