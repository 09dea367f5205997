"""An S3 server in a process of its own (moto), whose replies to GET a test can spoil.

`python s3_server.py PORT_FILE` writes its port. POST /_faults?kind=KIND&count=N spoils the next N replies to a GET of a
shard: `error` (500), `short` (half the bytes, with a matching length), `wrong` (one bit flipped), `slow` (half a
second late). GET /_faults gives the number of GETs of shards so far.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


class Spoiled:
    """The WSGI application."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._faults: list[str] = []
        self._gets = 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/_faults":
            asked = parse_qs(environ["QUERY_STRING"])
            if environ["REQUEST_METHOD"] == "POST":
                self._faults = asked["kind"] * int(asked["count"][0])
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [str(self._gets).encode()]
        if environ["REQUEST_METHOD"] != "GET" or not environ["PATH_INFO"].endswith(".tar"):
            return self._app(environ, start_response)
        self._gets += 1
        kind = self._faults.pop() if self._faults else None
        if kind == "error":
            start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"injected"]
        if kind == "slow":
            time.sleep(0.5)
        return self._spoil(kind, environ, start_response)

    def _spoil(self, kind: str | None, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        answer: list[Any] = []
        body = b"".join(self._app(environ, lambda status, headers, *_: answer.extend((status, headers))))
        status, headers = answer
        if kind == "short":
            body = body[: len(body) // 2]
        elif kind == "wrong":
            body = bytes([body[0] ^ 1]) + body[1:]
        headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
        start_response(status, [*headers, ("Content-Length", str(len(body)))])
        return [body]


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, Spoiled(), threaded=True)
    Path(sys.argv[1]).write_text(str(server.server_port))
    server.serve_forever()
