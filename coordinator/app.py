"""The routes of `/v1` and nothing else; `lamina.wire` has the messages, `docs/protocol.md` the prose."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from coordinator.aggregation.aggregator import remove_leftovers
from coordinator.house import House
from coordinator.http import bodies, downloads
from coordinator.http.integrity import Integrity
from coordinator.http.problems import install
from coordinator.rounds import cards, check_in, devices, operating, publish, rounds, updates
from coordinator.rounds import evaluation_results as evaluations
from coordinator.rounds.slots import Address
from coordinator.rounds.timeline import Clock
from coordinator.security import signatures
from coordinator.settings import Settings
from coordinator.store.incoming import Incoming
from coordinator.view import history, roster, status
from coordinator.view.last_acts import note_refusal, noting_refusals, noting_refusals_of_body
from coordinator.worker import Worker
from lamina.bounds import MAX_COUNT
from lamina.encoding.tensors import max_file_bytes
from lamina.errors import ProtocolError
from lamina.printable import printable
from lamina.record import Record
from lamina.wire import (
    REPORT_HEADER,
    SIGNATURE_HEADER,
    Accepted,
    CheckIn,
    Enrolment,
    Evaluation,
    NewName,
    Refused,
    RunCommand,
    TrainReport,
)

Most = Annotated[int, Query(ge=1, le=10_000)]
Index = Annotated[int, Path(ge=0, le=MAX_COUNT)]


def create_app(settings: Settings, clock: Clock = time.time, steady: Clock | None = None) -> FastAPI:
    """The coordinator on the state folder of `settings`.

    Raises StoreError or ConfigError if the folder cannot be opened.
    """
    house = House(settings, clock, steady)
    worker = Worker(house)
    # Here and not in the lifespan, whose failures are told as tracebacks.
    _finish_what_was_interrupted(house, worker)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        house.close()

    app = FastAPI(title="lamina coordinator", lifespan=lifespan, openapi_url=None)
    app.state.house = house
    app.state.worker = worker
    install(app)
    app.add_middleware(Integrity)

    # Dependencies run in the order of the parameters: nobody's body is read before he has shown his token.
    Enroller = Annotated[bool, Depends(house.gate.enroller)]
    Admin = Annotated[None, Depends(house.gate.admin)]
    Device = Annotated[str, Depends(house.gate.device)]
    Known = Annotated[None, Depends(house.gate.known)]
    Json = Annotated[bytes, Depends(bodies.read_json)]
    in_flight = bodies.InFlight(bodies.MOST_UPDATES)

    @app.get("/v1/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/devices")
    def enrol(is_trusted: Enroller, body: Json) -> Response:
        enrolled, is_new = devices.enrol(house, Enrolment.from_json(body, "the enrolment"), is_trusted)
        return _json(enrolled, 201 if is_new else 200)

    @app.get("/v1/devices")
    def list_devices(_: Admin) -> Response:
        return _json(devices.list_devices(house))

    @app.post("/v1/devices/{name}/removal")
    def remove_device(_: Admin, name: str, request: Request) -> Response:
        with _then(worker.wake):
            return _json(devices.remove_device(house, name, _who(request)))

    @app.post("/v1/devices/{name}/name")
    def rename_device(_: Admin, name: str, body: Json, request: Request) -> Response:
        new = NewName.from_json(body, "the new name")
        return _json(devices.rename_device(house, name, new.name, _who(request)))

    @app.get("/v1/history")
    def get_history(_: Admin, most: Most = 1000) -> Response:
        return _json(history.read_history(house, None, most))

    @app.get("/v1/runs/{run}/history")
    def get_history_of_run(_: Admin, run: str, most: Most = 1000) -> Response:
        return _json(history.read_history(house, run, most))

    @app.post("/v1/runs/{run}/commands")
    def command_run(_: Admin, run: str, body: Json, request: Request) -> Response:
        command = RunCommand.from_json(body, "the command")
        with _then(worker.wake), worker.paused():
            return _json(operating.operate(house, run, command, _who(request)))

    @app.post("/v1/check-in")
    def ask_for_work(device: Device, body: Json) -> Response:
        with _then(worker.wake), noting_refusals(house, device):
            answer = check_in.check_in(house, device, CheckIn.from_json(body, "the check-in"))
        if isinstance(answer, Refused):
            note_refusal(house, device, "refused", answer.detail)
        return _json(answer)

    @app.put("/v1/data-card")
    def put_data_card(device: Device, body: Json) -> Response:
        cards.keep_card(house, device, body)
        return Response(status_code=204)

    @app.api_route("/v1/blobs/{digest}", methods=["GET", "HEAD"])
    def get_blob(_: Known, digest: str, request: Request) -> Response:
        return downloads.answer_blob(house.blobs, digest, request)

    @app.put("/v1/blobs/{digest}")
    async def put_blob(_: Admin, digest: str, request: Request) -> Response:
        if house.blobs.find(digest) is not None:
            return Response(status_code=200)
        with house.blobs.receive() as incoming:
            await bodies.receive(request, incoming)
            await run_in_threadpool(house.blobs.keep, incoming, digest)
        return Response(status_code=201)

    @app.post("/v1/runs")
    async def publish_run(_: Admin, request: Request) -> Response:
        with bodies.manifest_file(settings.updates) as incoming:
            await bodies.read_manifest(request, incoming)
            signature = request.headers.get(SIGNATURE_HEADER)
            return _json(await run_in_threadpool(publish.publish_file, house, incoming.path, signature), 201)

    @app.get("/v1/manifests/{digest}/signature")
    def get_signature(_: Known, digest: str) -> Response:
        return _json(signatures.get_signature(house.settings, digest))

    @app.get("/v1/runs")
    def list_runs(_: Known) -> Response:
        return _json(status.list_runs(house))

    @app.get("/v1/runs/{run}")
    def run_status(_: Known, run: str) -> Response:
        return _json(status.run_status(house, run))

    @app.get("/v1/runs/{run}/devices")
    def run_devices(_: Known, run: str) -> Response:
        return _json(roster.device_list(house, run))

    @app.put("/v1/runs/{run}/stages/{stage}/rounds/{number}/update")
    async def put_update(device: Device, run: str, stage: Index, number: Index, request: Request) -> Response:
        async with noting_refusals_of_body(house, device):
            address = Address(device_id=device, run=run, stage=stage, round=number)
            with _then(worker.wake):
                return _json(await _receive_update(house, address, request, in_flight))

    @app.put("/v1/runs/{run}/stages/{stage}/rounds/{number}/evaluation")
    def put_evaluation(device: Device, run: str, stage: Index, number: Index, body: Json) -> Response:
        address = Address(device_id=device, run=run, stage=stage, round=number)
        with _then(worker.wake), noting_refusals(house, device):
            evaluation = Evaluation.from_json(body, "the evaluation")
            return _json(evaluations.accept_evaluation(house, address, evaluation))

    return app


async def _receive_update(house: House, address: Address, request: Request, in_flight: bodies.InFlight) -> Accepted:
    digest = bodies.content_digest(request)
    report, compression = _train_report(request), bodies.content_compression(request)
    expected = await run_in_threadpool(updates.expect_update, house, address, digest, report, compression)
    if isinstance(expected, Accepted):
        return expected
    limit_bytes = max_file_bytes(expected.specs)
    bodies.check_length(request, limit_bytes)
    with in_flight.one_more(address.device_id), Incoming(house.settings.updates, limit_bytes) as incoming:
        await bodies.receive(request, incoming)
        return await run_in_threadpool(updates.accept_update, house, address, incoming, digest, report, expected, compression)


def _finish_what_was_interrupted(house: House, worker: Worker) -> None:
    """Before the first device is answered. Raises StoreError, DiskFullError."""
    try:
        rounds.mend_all(house)
        rounds.advance_all(house)
        worker.work()
        remove_leftovers(house)
        house.variants.remove_outdated(house.manifest)
    except BaseException:
        house.close()
        raise


@contextmanager
def _then(wake: Callable[[], None]) -> Iterator[None]:
    """After the block, however it ends: what it wrote may have made something due."""
    try:
        yield
    finally:
        wake()


def _json(record: Record, status_code: int = 200) -> Response:
    return Response(record.model_dump_json(), status_code, media_type="application/json")


def _who(request: Request) -> str:
    """The operator, as far as one can tell: the admin's token, and where it came from."""
    return printable(f"admin token from {request.client.host}", 100) if request.client else "admin token"


def _train_report(request: Request) -> TrainReport:
    text = request.headers.get(REPORT_HEADER)
    if text is None:
        raise ProtocolError(f"the update has no {REPORT_HEADER} header with its TrainReport")
    return TrainReport.from_json(text, f"the {REPORT_HEADER} header")
