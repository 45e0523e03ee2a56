"""What a coordinator can be told at start-up."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from lamina.record import Record

PositiveSeconds = Annotated[float, Field(gt=0)]


class Settings(Record):
    """Where the state lives, where to listen, and how often an idle device may ask.

    Everything under `state` belongs to one coordinator: the database, the blobs, the two token files, the address.
    `presence_seconds` is how long a device counts as here after it asked for work; it bounds how soon a round that waits
    for its cohort notices that a device has left. `allow_unsigned` takes bundles that nobody signed. Of the last
    `keep_rounds` closed rounds of a run the weights are kept.

    `connections` are open at a time, fewer where the process may not open enough files, and half of them for one address; one
    without a whole request for `idle_seconds` is closed. An address may enrol `enrolment_burst` devices at once and then
    `enrolments_per_minute`; the same with `failure_burst` for requests with a wrong token. Beyond that, the answer is 429.
    """

    state: Path
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8763
    wait_seconds_min: PositiveSeconds = 0.5
    wait_seconds_max: PositiveSeconds = 2.0
    presence_seconds: PositiveSeconds = 60.0
    allow_unsigned: bool = False
    keep_rounds: Annotated[int, Field(ge=0, le=1000)] = 3
    connections: Annotated[int, Field(ge=8)] = 2000
    idle_seconds: PositiveSeconds = 10.0
    enrolments_per_minute: Annotated[float, Field(gt=0)] = 60.0
    enrolment_burst: Annotated[int, Field(ge=1)] = 100
    failures_per_minute: Annotated[float, Field(gt=0)] = 60.0
    failure_burst: Annotated[int, Field(ge=1)] = 100

    @model_validator(mode="after")
    def _waits_fit(self) -> Self:
        if self.wait_seconds_min > self.wait_seconds_max:
            raise ValueError(f"wait_seconds_min {self.wait_seconds_min} is above wait_seconds_max {self.wait_seconds_max}")
        if self.wait_seconds_max > self.presence_seconds / 2:
            raise ValueError(
                f"wait_seconds_max {self.wait_seconds_max} is above half of presence_seconds {self.presence_seconds}: "
                "a waiting device would count as gone"
            )
        return self

    @property
    def database(self) -> Path:
        return self.state / "coordinator.sqlite"

    @property
    def blobs(self) -> Path:
        return self.state / "blobs"

    @property
    def updates(self) -> Path:
        return self.state / "updates"

    @property
    def signatures(self) -> Path:
        return self.state / "signatures"

    @property
    def trusted(self) -> Path:
        return self.state / "trusted.json"

    @property
    def enrolment_token(self) -> Path:
        return self.state / "enrolment.token"

    @property
    def admin_token(self) -> Path:
        return self.state / "admin.token"

    @property
    def address(self) -> Path:
        return self.state / "address"
