"""The routes of split training (`lamina.split_wire`); mounted beside the others by `coordinator.app`."""

from hashlib import sha256
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from coordinator import bodies
from coordinator.house import House
from coordinator.split.runs import SplitRuns
from coordinator.split.runtime import Runtime
from lamina.bounds import MAX_COUNT
from lamina.errors import HashMismatchError, ProtocolError, TooLargeError
from lamina.record import Record
from lamina.segments import TensorSpec
from lamina.split_bodies import body_limit
from lamina.split_wire import SplitCheckIn, SplitEvaluation, SplitReport, features_up, gradients_up
from lamina.wire import REPORT_HEADER, SIGNATURE_HEADER

Authorization = Annotated[str | None, Header()]
Examples = Annotated[int, Query(ge=1, le=MAX_COUNT)]
Index = Annotated[int, Path(ge=0, le=MAX_COUNT)]


def split_routes(house: House, runtime: Runtime | None = None) -> APIRouter:
    """Every route of `/v1/split`. `runtime` runs the coordinator's part of a model."""
    runs = SplitRuns(house, runtime)
    router = APIRouter(prefix="/v1/split")

    def as_admin(authorization: Authorization = None) -> None:
        house.tokens.require_admin(authorization)

    def as_device(authorization: Authorization = None) -> str:
        return house.tokens.require_device(authorization)

    def as_anyone_known(authorization: Authorization = None) -> None:
        house.tokens.require_any(authorization)

    Admin = Annotated[None, Depends(as_admin)]
    Device = Annotated[str, Depends(as_device)]
    Known = Annotated[None, Depends(as_anyone_known)]
    Json = Annotated[bytes, Depends(bodies.read_json)]

    @router.post("/runs")
    def publish(_: Admin, body: Json, request: Request) -> Response:
        return _json(runs.publish(body, request.headers.get(SIGNATURE_HEADER)), 201)

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
        body = await _read(request, features_up(found.plan, examples))
        return _bytes(await run_in_threadpool(found.features, device, number, step, examples, body))

    @router.post("/runs/{run}/rounds/{number}/steps/{step}/gradients")
    async def gradients(device: Device, run: str, number: Index, step: Index, examples: Examples, request: Request) -> Response:
        found = runs.find(run)
        found.check_count(examples)
        body = await _read(request, gradients_up(found.plan, examples, False))
        return _bytes(await run_in_threadpool(found.gradients, device, number, step, examples, body))

    @router.post("/runs/{run}/rounds/{number}/answers")
    async def answers(device: Device, run: str, number: Index, examples: Examples, request: Request) -> Response:
        found = runs.find(run)
        found.check_count(examples)
        body = await _read(request, features_up(found.plan, examples))
        return _bytes(await run_in_threadpool(found.answers, device, number, examples, body))

    @router.put("/runs/{run}/rounds/{number}/update")
    async def update(device: Device, run: str, number: Index, request: Request) -> Response:
        found = runs.find(run)
        text = request.headers.get(REPORT_HEADER)
        if text is None:
            raise ProtocolError(f"the update has no {REPORT_HEADER} header with its SplitReport")
        report = SplitReport.from_json(text, f"the {REPORT_HEADER} header")
        body = await _read(request, found.manifest.specs(found.plan.sent(False)))
        return _json(await run_in_threadpool(found.update, device, number, body, report))

    @router.put("/runs/{run}/rounds/{number}/evaluation")
    def evaluation(device: Device, run: str, number: Index, body: Json) -> Response:
        return _json(runs.find(run).evaluation(device, number, SplitEvaluation.from_json(body, "the evaluation")))

    return router


async def _read(request: Request, specs: list[TensorSpec]) -> bytes:
    """The body, no larger than one with these tensors can be. Raises TooLargeError, HashMismatchError, ProtocolError."""
    limit_bytes = body_limit(specs)
    bodies.check_length(request, limit_bytes)
    promised = bodies.content_digest(request)
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > limit_bytes:
            raise TooLargeError(f"the body is larger than the {limit_bytes} bytes that are legal here")
    if sha256(data).hexdigest() != promised:
        raise HashMismatchError(f"the body of {len(data)} bytes has another sha256 than its header says; send it again")
    return bytes(data)


def _json(record: Record, status_code: int = 200) -> Response:
    return Response(record.model_dump_json(), status_code, media_type="application/json")


def _bytes(data: bytes) -> Response:
    return Response(data, media_type="application/octet-stream")
