"""A server on loopback that speaks OpenAI's chat protocol and answers as a test says."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


@dataclass
class ChatApi:
    """What the server does; tests change the attributes while it runs.

    Attributes:
        models: that it lists.
        answers: text by the pixel at the top left of the first image.
        responses: (status, headers, body) of the next requests for an answer, before it answers any.
        delay_s: before every answer.
        requests: (path, headers, body) of every request so far.
    """

    models: list[str] = field(default_factory=lambda: ["tiny"])
    key: str = ""
    answers: dict[tuple[int, int, int], str] = field(default_factory=dict)
    finish_reason: str = "stop"
    responses: list[tuple[int, dict[str, str], str]] = field(default_factory=list)
    delay_s: float = 0.0
    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str, headers: dict[str, str], body: Any) -> tuple[int, dict[str, str], str]:
        """Returns status, headers and body."""
        self.requests.append((path, headers, body))
        if self.key and headers.get("Authorization") != f"Bearer {self.key}":
            return 401, {}, json.dumps({"error": {"message": f"wrong key {headers.get('Authorization')}"}})
        if path == "/v1/models":
            return 200, {}, json.dumps({"data": [{"id": name} for name in self.models]})
        if path != "/v1/chat/completions":
            return 404, {}, json.dumps({"detail": "Not Found"})
        if self.responses:
            return self.responses.pop(0)
        time.sleep(self.delay_s)
        if body["model"] not in self.models:
            return 404, {}, json.dumps({"error": {"message": f"The model `{body['model']}` does not exist."}})
        message = {"role": "assistant", "content": self.answers.get(first_pixel(body), "yes")}
        return 200, {}, json.dumps({"choices": [{"message": message, "finish_reason": self.finish_reason}]})


def decoded_images(body: Any) -> list[Image.Image]:
    """The images of a request."""
    (message,) = body["messages"]
    urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def first_pixel(body: Any) -> tuple[int, int, int]:
    """The pixel at the top left of a request's first image."""
    images = decoded_images(body)
    return images[0].convert("RGB").getpixel((0, 0)) if images else (-1, -1, -1)  # type: ignore[return-value]


@contextmanager
def running_api() -> Iterator[ChatApi]:
    """The server while the block runs."""
    api = ChatApi()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._respond(None)

        def do_POST(self) -> None:
            self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing is printed."""

        def _respond(self, body: Any) -> None:
            status, headers, text = api.answer(self.path, dict(self.headers), body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            with suppress(ConnectionError):  # a client that did not wait
                self.wfile.write(text.encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    api.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
