"""A peer on loopback that speaks no protocol but says what a test wants: raw bytes, as fast or as slowly as it likes."""

import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress

Reply = Callable[[str], "Iterable[bytes]"]


class Hostile:
    """Answers each request with what `reply(path)` gives, piece by piece, and closes the connection.

    `heads` are the heads of the requests, as text. `wrap` makes a TLS socket of an accepted one.
    """

    def __init__(self, reply: Reply, wrap=lambda connection: connection):
        self._reply, self._wrap, self.heads = reply, wrap, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ended = threading.Event()
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def paths(self):
        return [head.split(" ")[1] for head in self.heads]

    def pause(self, seconds):
        """Waits, but no longer than the test lasts."""
        self._ended.wait(seconds)

    def close(self):
        self._ended.set()
        self._listener.close()

    def _accept(self):
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with suppress(OSError), self._wrap(connection) as wrapped:
            wrapped.settimeout(10)
            head = b""
            while b"\r\n\r\n" not in head:
                piece = wrapped.recv(65536)
                if not piece:
                    return
                head += piece
                if head[:1] == b"\x16":  # a TLS handshake, where HTTP was expected
                    head += b"\r\n\r\n"
            text, _, body = head.partition(b"\r\n\r\n")
            self.heads.append(text.decode("latin-1"))
            lines = text.decode("latin-1").lower().split("\r\n")
            length = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), 0)
            while len(body) < length:
                body += wrapped.recv(65536)
            for piece in self._reply(self.heads[-1].split(" ")[1]):
                if self._ended.is_set():
                    return
                wrapped.sendall(piece)


@contextmanager
def hostile(reply, wrap=lambda connection: connection):
    server = Hostile(reply, wrap)
    try:
        yield server
    finally:
        server.close()


def http(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """A whole answer; `headers` have underscores for dashes, and replace the usual ones."""
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in fields.items() if value), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body
