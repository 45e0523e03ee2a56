"""The routes of split training (`lamina.split.wire`); mounted beside the others by `coordinator.app`."""

from hashlib import sha256
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from coordinator.house import House
from coordinator.http import bodies
from coordinator.split.runs import SplitRuns
from coordinator.split.runtime import Runtime
from lamina.bounds import MAX_COUNT
from lamina.errors import HashMismatchError, ProtocolError
from lamina.plans.segments import TensorSpec
from lamina.record import Record
from lamina.split.bodies import body_limit
from lamina.split.wire import SplitCheckIn, SplitEvaluation, SplitReport, features_up, gradients_up
from lamina.wire import REPORT_HEADER, SIGNATURE_HEADER

Examples = Annotated[int, Query(ge=1, le=MAX_COUNT)]
Index = Annotated[int, Path(ge=0, le=MAX_COUNT)]


def split_routes(house: House, runtime: Runtime | None = None) -> APIRouter:
    """Every route of `/v1/split`. `runtime` runs the coordinator's part of a model."""
    runs = SplitRuns(house, runtime)
    router = APIRouter(prefix="/v1/split")

    Admin = Annotated[None, Depends(house.gate.admin)]
    Device = Annotated[str, Depends(house.gate.device)]
    Known = Annotated[None, Depends(house.gate.known)]
    Json = Annotated[bytes, Depends(bodies.read_json)]
    in_flight = bodies.InFlight(bodies.MOST_STEPS)

    @router.post("/runs")
    async def publish(_: Admin, request: Request) -> Response:
        with bodies.manifest_file(house.settings.updates) as incoming:
            await bodies.read_manifest(request, incoming)
            signature = request.headers.get(SIGNATURE_HEADER)
            return _json(await run_in_threadpool(runs.publish_file, incoming.path, signature), 201)

    @router.get("/runs")
    def list_runs(_: Known) -> Response:
        return _json(runs.list())

    @router.get("/runs/{run}")
    def status(_: Known, run: str) -> Response:
        return _json(runs.find(run).status())

    @router.post("/check-in")
    def check_in(device: Device, body: Json) -> Response:
        return _json(runs.check_in(device, SplitCheckIn.from_json(body, "the check-in")))

    @router.post("/runs/{run}/rounds/{number}/steps/{step}/features")
    async def features(device: Device, run: str, number: Index, step: Index, examples: Examples, request: Request) -> Response:
        found = runs.find(run)
        found.check_count(examples)
        await run_in_threadpool(found.expect_step, device, number)
        with in_flight.one_more(device):
            body = await _read(request, features_up(found.plan, examples))
            return _bytes(await run_in_threadpool(found.features, device, number, step, examples, body))

    @router.post("/runs/{run}/rounds/{number}/steps/{step}/gradients")
    async def gradients(device: Device, run: str, number: Index, step: Index, examples: Examples, request: Request) -> Response:
        found = runs.find(run)
        found.check_count(examples)
        await run_in_threadpool(found.expect_step, device, number)
        with in_flight.one_more(device):
            body = await _read(request, gradients_up(found.plan, examples, False))
            return _bytes(await run_in_threadpool(found.gradients, device, number, step, examples, body))

    @router.post("/runs/{run}/rounds/{number}/answers")
    async def answers(device: Device, run: str, number: Index, examples: Examples, request: Request) -> Response:
        found = runs.find(run)
        found.check_count(examples)
        await run_in_threadpool(found.expect_answers, device, number)
        with in_flight.one_more(device):
            body = await _read(request, features_up(found.plan, examples))
            return _bytes(await run_in_threadpool(found.answers, device, number, examples, body))

    @router.put("/runs/{run}/rounds/{number}/update")
    async def update(device: Device, run: str, number: Index, request: Request) -> Response:
        found = runs.find(run)
        text = request.headers.get(REPORT_HEADER)
        if text is None:
            raise ProtocolError(f"the update has no {REPORT_HEADER} header with its SplitReport")
        report = SplitReport.from_json(text, f"the {REPORT_HEADER} header")
        await run_in_threadpool(found.expect_update, device, number)
        with in_flight.one_more(device):
            body = await _read(request, found.manifest.specs(found.plan.sent(False)))
            return _json(await run_in_threadpool(found.update, device, number, body, report))

    @router.put("/runs/{run}/rounds/{number}/evaluation")
    def evaluation(device: Device, run: str, number: Index, body: Json) -> Response:
        return _json(runs.find(run).evaluation(device, number, SplitEvaluation.from_json(body, "the evaluation")))

    return router


async def _read(request: Request, specs: list[TensorSpec]) -> bytes:
    """The body, no larger than one with these tensors can be. Raises TooLargeError, HashMismatchError, ProtocolError."""
    promised = bodies.content_digest(request)
    data = await bodies.read(request, body_limit(specs))
    if sha256(data).hexdigest() != promised:
        raise HashMismatchError(f"the body of {len(data)} bytes has another sha256 than its header says; send it again")
    return data


def _json(record: Record, status_code: int = 200) -> Response:
    return Response(record.model_dump_json(), status_code, media_type="application/json")


def _bytes(data: bytes) -> Response:
    return Response(data, media_type="application/octet-stream")
