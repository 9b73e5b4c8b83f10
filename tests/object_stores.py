"""Object stores for tests: a stand-in for S3 on this machine, and servers in its place that are of no use."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.request import Request, urlopen
from uuid import uuid4
from xml.etree import ElementTree as ET

from moto.server import ThreadedMotoServer

from tidelog_server._content_store import MARK_NAME

_SPACE: Final = "{http://s3.amazonaws.com/doc/2006-03-01/}"


class Bucket:
    """
    A bucket of the stand-in, with a name of its own.

    Attributes:
        url: Where contents may lie in it.
        options: How it is reached.
    """

    def __init__(self, endpoint: str) -> None:
        name = f"bucket-{uuid4().hex}"
        self.url = f"s3://{name}/some/prefix"
        self.options = s3_options(endpoint)
        self._address = f"{endpoint}/{name}"
        self._call("", "PUT")

    def objects(self) -> list[str]:
        """Return the keys of all objects, but for the mark of the place."""
        found = self._call("?list-type=2")
        assert found.findtext(f"{_SPACE}IsTruncated") == "false"
        keys = (key.text or "" for key in found.iter(f"{_SPACE}Key"))
        return sorted(key for key in keys if not key.endswith(MARK_NAME))

    def unfinished_uploads(self) -> list[str]:
        """Return the keys of multipart uploads that were neither completed nor aborted."""
        return [key.text or "" for key in self._call("?uploads").iter() if key.tag.endswith("Key")]

    def _call(self, query: str, method: str = "GET") -> ET.Element:
        with urlopen(Request(self._address + query, method=method), timeout=10) as answer:
            return ET.fromstring(answer.read() or "<none/>")


@contextmanager
def s3_stand_in() -> Iterator[str]:
    """Run a stand-in for S3 in this process; give its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


@contextmanager
def refusing(status: int, code: str) -> Iterator[str]:
    """Run a server that answers everything with one error; give its address."""

    class Refusing(BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline()
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            self.rfile.read(int(self.headers.get("content-length", 0)))
            body = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code></Error>".encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's word
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def silent() -> Iterator[str]:
    """Listen, and answer nothing; give the address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def s3_options(endpoint: str, **client_options: Any) -> dict[str, Any]:
    """Return the options of a store that speaks S3 at an address."""
    config = {"endpoint": endpoint, "access_key_id": "a", "secret_access_key": "b", "region": "us-east-1"}
    return {"config": config, "client_options": {"allow_http": True, **client_options}}
