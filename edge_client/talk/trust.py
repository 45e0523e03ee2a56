"""Whose programs this device runs: every manifest's signature is verified before the manifest or a program is fetched.

    --trust KEY        these keys, and no others; kept in the state folder
    without it         the first key that the coordinator shows is kept (trust on first use, as SSH does), its fingerprint told
    --allow-unsigned   a manifest without a signature is used; one with a wrong signature never is

The first use is the weak moment: over plain HTTP, whoever sits between may show a key of his own then. `--trust` closes it.
The talking process alone verifies; the training process gets files whose bytes a verified manifest names.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from edge_client.progress import Say
from lamina.bundles.signing import Trust, TrustedKey, TrustedKeys, check_signature, fingerprint
from lamina.errors import ConfigError, SignatureError
from lamina.files import write_durably
from lamina.wire import Signature

TRUSTED_FILE, SIGNATURE_FILE = "trusted.json", "signature.json"


class Verifier:
    """The keys of one state folder."""

    def __init__(self, state: Path, given: Sequence[str], allow_unsigned: bool, url: str, say: Say) -> None:
        """`given` are the keys of the command line, which replace those kept. Raises ConfigError for one that is none."""
        self._file, self._kept_signature = state / TRUSTED_FILE, state / SIGNATURE_FILE
        self._allow_unsigned, self._url, self._say = allow_unsigned, url, say
        if given:
            TrustedKeys.given(given, "given with --trust").write(self._file)
        self._trusted = TrustedKeys.read(self._file)

    def check(self, digest: str, fetch: Callable[[str], Signature | None]) -> None:
        """Raises SignatureError unless the manifest with this sha256 may be used. `fetch` asks for its signature.

        A signature that was verified stays on disk, and is verified again by every process of this device: 5 ms.
        """
        if self._is_known(digest):
            return
        signature = fetch(digest)
        if signature is not None and not self._trusted.keys:
            check_signature(digest, signature)
            self._keep_first(signature)
        who = self._trust().check(digest, signature)
        if signature is None:
            self._say(f"manifest {digest[:12]} is {who}; it is used because of --allow-unsigned")
        else:
            write_durably(self._kept_signature, signature.to_json())
            self._say(f"manifest {digest[:12]} is {who}")

    def _is_known(self, digest: str) -> bool:
        """Whether the kept signature is one of this very manifest, by a key that is still trusted."""
        try:
            signature = Signature.from_file(self._kept_signature)
            self._trust().check(digest, signature)
        except (ConfigError, SignatureError):  # none kept, damaged, or of another manifest
            return False
        return True

    def _trust(self) -> Trust:
        way_out = f"then join again with --trust {{key}}, or delete {self._file} to accept the next key that is shown"
        return Trust(self._trusted.names, self._allow_unsigned, way_out)

    def _keep_first(self, signature: Signature) -> None:
        where = f"the first one that {self._url} showed"
        self._trusted = TrustedKeys(keys=(TrustedKey(key=signature.public_key, name=where[:200]),))
        self._trusted.write(self._file)
        self._say(
            f"from now on only programs signed by key {fingerprint(signature.public_key)} are run, {where}; compare it with "
            "`lamina key show` on the exporter's machine, or join with --trust"
        )
