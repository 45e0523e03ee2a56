"""Every refusal is a problem document (RFC 9457): the code of the error, a title, the status, and what to do."""

import logging
from math import ceil

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lamina.errors import BusyError, ConfigError, LaminaError, ProtocolError, UnknownNameError
from lamina.files import raise_if_full
from lamina.printable import printable
from lamina.wire import Problem

log = logging.getLogger("lamina.coordinator")

STATUS_OF_CODE: dict[str, int] = {
    "lamina": 500,
    "config": 422,
    "bundle": 422,
    "hash-mismatch": 400,
    "tensor-file": 422,
    "signature": 422,
    "protocol": 400,
    "not-enrolled": 401,
    "unknown-name": 404,
    "round-closed": 409,
    "update-rejected": 409,
    "too-large": 413,
    "busy": 429,
    "store": 503,
    "disk-full": 507,
}
"""The codes that this service can answer with; the others of `lamina.errors` are raised on devices and at export only."""

TITLES = {
    "lamina": "The coordinator has a bug",
    "config": "The message is not valid",
    "bundle": "The bundle is not whole",
    "hash-mismatch": "The bytes are not those that were announced",
    "tensor-file": "The tensor file cannot be used",
    "signature": "The bundle is not signed by a trusted key",
    "protocol": "The request cannot be served",
    "not-enrolled": "A valid token is needed",
    "unknown-name": "There is no such thing here",
    "round-closed": "The round no longer takes this",
    "update-rejected": "The round cannot count this",
    "too-large": "The body is too large",
    "busy": "Too much at once",
    "store": "The coordinator's storage failed",
    "disk-full": "The coordinator's disk is full",
}


def problem(error: LaminaError, status: int | None = None, headers: dict[str, str] | None = None) -> Response:
    """The answer for an error. `status` overrides the one of its code, where HTTP has a more exact one."""
    code = error.code if error.code in STATUS_OF_CODE else LaminaError.code
    status = status or STATUS_OF_CODE[code]
    body = Problem(code=code, title=TITLES[code], status=status, detail=error.message)
    headers = dict(headers or {})
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, BusyError):
        headers["Retry-After"] = str(ceil(error.retry_after_seconds))
    return Response(body.model_dump_json(), status, headers, "application/problem+json")


def install(app: FastAPI) -> None:
    """Makes every way to fail end in a problem document."""
    app.add_exception_handler(LaminaError, _of_lamina)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(ClientDisconnect, _of_disconnect)
    app.add_exception_handler(OSError, _of_os)
    app.add_exception_handler(Exception, _of_bug)


def _of_lamina(_request: Request, error: Exception) -> Response:
    assert isinstance(error, LaminaError)
    return problem(error)


def _of_validation(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:3])
    return problem(ConfigError(f"the address is not valid: {printable(faults, 500)}"))


def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = _what(request)
    if error.status_code == 404:
        return problem(UnknownNameError(f"there is no {what} here; docs/protocol.md lists the addresses"))
    return problem(ProtocolError(f"{what}: {error.detail}"), error.status_code, dict(error.headers or {}))


def _of_disconnect(_request: Request, _error: Exception) -> Response:
    return problem(ProtocolError("the connection ended within the body; send it again"))


def _of_os(request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    try:
        raise_if_full(error, request.app.state.house.settings.state / "any")
    except LaminaError as full:
        return problem(full)
    return _of_bug(request, error)


def _of_bug(request: Request, error: Exception) -> Response:
    log.error("%s failed", _what(request), exc_info=error)
    return problem(LaminaError(f"{type(error).__name__} in the coordinator; its log has the details. Please report it"))


def _what(request: Request) -> str:
    """Method and path, from the scope: `request.url` reads the Host header, which may be anything."""
    return printable(f"{request.method} {request.scope['path']}")
