"""What a user's commands say to a coordinator about split runs: publish a bundle, read the status."""

from collections.abc import Callable
from pathlib import Path

from lamina.bundle import blob_path, manifest_bytes, read_signature
from lamina.client import Client
from lamina.split_manifest import SplitManifest
from lamina.split_wire import SplitStatus
from lamina.wire import SIGNATURE_HEADER, Published, RunList


class SplitClient(Client):
    """A connection to one coordinator, as the admin or with a device's token for the status."""

    def publish_split(
        self, folder: Path, manifest: SplitManifest, on_bytes: Callable[[int], None] = lambda count: None
    ) -> Published:
        """As `Client.publish`, for the bundle of a split plan."""
        for digest, size in manifest.blobs.items():
            if self.has_blob(digest):
                on_bytes(size)
            else:
                self.put_blob(digest, blob_path(folder, digest), on_bytes)
        signature = read_signature(folder)
        headers = {SIGNATURE_HEADER: signature.model_dump_json()} if signature else None
        answer = self._send("POST", "/v1/split/runs", content=manifest_bytes(folder), headers=headers)
        return Published.from_json(answer.content, "the answer to publishing")

    def split_runs(self) -> RunList:
        return RunList.from_json(self._send("GET", "/v1/split/runs").content, "the list of split runs")

    def split_run(self, run: str) -> SplitStatus:
        return SplitStatus.from_json(self._send("GET", f"/v1/split/runs/{run}").content, f"the status of {run}")
