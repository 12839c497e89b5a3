"""Cloud Storage on this machine, with the faults that a test asks for.

gcp-storage-emulator keeps the objects. It answers one request at a time. The handler here adds what
it lacks and checkpoints need: preconditions of uploads.
"""

import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound

BUCKET = "bucket"
NAME = re.compile(rb'"name": ("[^"]+")')

Refuse = Callable[[str, str], int | str | None]


class CloudStorage:
    """An emulator with one bucket, on a free port, in a thread.

    Attributes:
      environment: variables by which gcsfs, tensorstore and Google's client find the emulator.
      requests: of all requests, refused ones too, the method and the object that each is about; of
        a listing the prefix.
      refuse: asked about each request before it is served, with the same two. It returns None to
        serve it, an HTTP status to answer instead, or "cut" to close the connection unanswered.
    """

    def __init__(self):
        self.requests: list[tuple[str, str]] = []
        self.refuse: Refuse = lambda method, name: None
        for logger in ("gcp_storage_emulator", "api.object"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        self._emulator = server.create_server("localhost", 0, in_memory=True, default_bucket=BUCKET)

    def __enter__(self) -> "CloudStorage":
        cloud = self

        class Handler(_Handler):
            def refusal(self, method: str, name: str) -> int | str | None:
                cloud.requests.append((method, name))
                return cloud.refuse(method, name)

        with patch.object(server, "RequestHandler", Handler):
            self._emulator.start()
        url = f"http://localhost:{self._emulator._api._httpd.server_address[1]}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            # The emulator can't say what kind of bucket it has, which gcsfs would ask each time.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        return self

    def __exit__(self, *exc) -> None:
        self._emulator.stop()

    def names(self, directory: str) -> list[str]:
        """The objects below gs://BUCKET/DIRECTORY/, named from there, sorted."""
        listed = self._emulator._storage.get_file_list(BUCKET, prefix=f"{directory}/")[0]
        return sorted(each["name"].removeprefix(f"{directory}/") for each in listed)

    @contextmanager
    def faults(self, refuse: Refuse) -> Iterator[None]:
        """Refuses requests as `refuse` says, while the context lasts."""
        self.refuse = refuse
        try:
            yield
        finally:
            self.refuse = lambda method, name: None


class Outage:
    """Answers 503 to all requests for some seconds, for `CloudStorage.faults`.

    Args:
      seconds: counted from the first request of `method` about an object whose name has `part`.

    Attributes:
      refused: number of requests so far.
    """

    def __init__(self, seconds: float, method: str, part: str):
        self.refused, self._seconds, self._method, self._part = 0, seconds, method, part
        self._end: float | None = None

    def __call__(self, method: str, name: str) -> int | None:
        if self._end is None and method == self._method and self._part in name:
            self._end = time.monotonic() + self._seconds
        if self._end is None or time.monotonic() > self._end:
            return None
        self.refused += 1
        return HTTPStatus.SERVICE_UNAVAILABLE


class _Handler(server.RequestHandler):
    def refusal(self, method: str, name: str) -> int | str | None:
        raise NotImplementedError

    def do_GET(self) -> None:
        self._serve(super().do_GET)

    def do_POST(self) -> None:
        self._serve(super().do_POST)

    def do_PUT(self) -> None:
        self._serve(super().do_PUT)

    def do_DELETE(self) -> None:
        self._serve(super().do_DELETE)

    def _serve(self, serve: Callable[[], None]) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.rfile = io.BytesIO(body)
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if "name" in query:  # an upload by tensorstore
            name = query["name"]
        elif url.path.startswith("/upload/"):  # by gcsfs, with JSON before the content
            name = json.loads(NAME.findall(body)[0])
        else:
            name = unquote(url.path.partition("/o/")[2]) or query.get("prefix", "")
        refusal = self.refusal(self.command, name)
        generation = query.get("ifGenerationMatch")  # 0 stands for no object
        if refusal is None and generation not in (None, self._generation(name)):
            refusal = HTTPStatus.PRECONDITION_FAILED
        with suppress(ConnectionError):  # gcsfs may hang up before it has read an object
            if refusal == "cut":
                self.close_connection = True
            elif refusal is not None:
                self._answer(int(refusal), {"error": {"code": refusal, "message": "refused"}})
            else:
                serve()

    def _generation(self, name: str) -> str:
        try:
            return self.storage.get_file_obj(BUCKET, name)["generation"]
        except NotFound:
            return "0"

    def _answer(self, status: int, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
