"""What a user's commands say to a coordinator about split runs: publish a bundle, read the status."""

from collections.abc import Callable
from pathlib import Path

from lamina.client import MOST_STATUS_BYTES, Client
from lamina.net.connection import parsed, path_of
from lamina.split.manifest import SplitManifest
from lamina.split.wire import SplitStatus
from lamina.wire import Published, RunList


class SplitClient(Client):
    """A connection to one coordinator, as the admin or with a device's token for the status."""

    def publish_split(
        self, folder: Path, manifest: SplitManifest, on_bytes: Callable[[int], None] = lambda count: None
    ) -> Published:
        """As `Client.publish`, for the bundle of a split plan."""
        return self._publish("/v1/split/runs", folder, manifest.blobs, on_bytes)

    def split_runs(self) -> RunList:
        return parsed(RunList, self._send("GET", "/v1/split/runs"))

    def split_run(self, run: str) -> SplitStatus:
        return parsed(SplitStatus, self._send("GET", path_of("v1", "split", "runs", run), most_bytes=MOST_STATUS_BYTES))
