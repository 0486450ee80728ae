"""A client of servers that speak OpenAI's chat protocol, such as `vllm serve`: one request at a time, greedy answers.

Every failure becomes one sentence. The key is sent to the server and is never part of a message.
"""

import base64
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
from PIL import ExifTags, Image

from data_recipes.schema.sample import DataError
from llava_next.inputs.anyres import decode
from train.config.schema import ConfigError
from train.evaluate.evaluation_ranks import EvaluationError

KEY_VARIABLE = "LLAVA_NEXT_SERVER_KEY"
"""Environment variable of the key that is sent to the server of --server."""
_CONNECT_TIMEOUT_S = 10.0
_MAX_TRIES = 6
_MAX_WAIT_S = 60.0
_BUSY = (429, 500, 502, 503, 504)
_MAX_QUOTED = 300

Part = dict[str, Any]
"""A part of a message: a text or an image."""


@dataclass(frozen=True)
class Reply:
    """An answer, and whether it reached the maximum number of new tokens."""

    text: str
    is_cut: bool


class ChatServer:
    """A server, and one of its models.

    Args:
        url: of the API, such as http://localhost:8000/v1; without a path, /v1 is added.
        model: its name; None for the only one that the server lists.
        key: is sent as a bearer token if it is not empty.
        timeout_s: until a request must be answered.
        key_variable: where the key is from, for messages.
        wait: sleeps for a number of seconds, before a request is repeated that the server was too busy for.

    Raises:
        ConfigError: the address is not one, or the model is not named and the server lists none or several.
        EvaluationError: the server cannot be reached or fails.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        *,
        key: str = "",
        timeout_s: float = 600.0,
        key_variable: str = KEY_VARIABLE,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = _check_url(url)
        self._key, self._key_variable = key, key_variable
        self._timeout_s, self._wait = timeout_s, wait
        self.model = self._find_model() if model is None else model

    def ask(self, parts: Sequence[Part], max_new_tokens: int, what: str) -> Reply:
        """Returns the greedy answer to a message.

        Args:
            parts: texts and images in their order.
            what: the question, for messages about it.

        Raises:
            ConfigError: the server has no such model, or refuses the key.
            EvaluationError: the server cannot be reached, refuses the request, or answers something else.
        """
        message = {"role": "user", "content": list(parts)}
        request = {"model": self.model, "messages": [message], "max_tokens": max_new_tokens, "temperature": 0}
        values = self._request("POST", "/chat/completions", request, what)
        try:
            choice = values["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            text = reason = None
        if not isinstance(text, str):
            raise EvaluationError(f"{self.url}: the answer to {what} has no text: {self._quote(str(values))}")
        return Reply(text.strip(), reason == "length")

    def _find_model(self) -> str:
        values = self._request("GET", "/models", None, "the list of models")
        names = [str(each["id"]) for each in _list_entries(values)]
        if len(names) != 1:
            listed = f"several models: {', '.join(names)}" if names else "no model"
            raise ConfigError(f"{self.url} lists {listed}; name the one to evaluate with --server-model")
        return names[0]

    def _request(self, method: str, path: str, body: Any, what: str) -> Any:
        for number in range(_MAX_TRIES):
            response = self._send(method, path, body, what)
            if response.status_code not in _BUSY or number == _MAX_TRIES - 1:
                break
            self._wait(_seconds_to_wait(response, number))
        if response.status_code != 200:
            self._raise_refusal(response, what)
        try:
            return response.json()
        except ValueError as error:
            raise EvaluationError(
                f"{self.url}: the answer to {what} is not JSON: {self._quote(response.text)}; is this the address of "
                "an API of OpenAI's form?"
            ) from error

    def _send(self, method: str, path: str, body: Any, what: str) -> requests.Response:
        timeout = (_CONNECT_TIMEOUT_S, self._timeout_s)
        try:
            return requests.request(
                method, self.url + path, json=body, timeout=timeout, auth=self._authorize, allow_redirects=False
            )
        except requests.Timeout as error:
            raise EvaluationError(
                f"{self.url} did not answer {what} within {self._timeout_s:g} s; raise --server-timeout, or lower "
                "--batch-size, the number of requests at a time"
            ) from error
        except requests.ConnectionError as error:
            refused = "refused" in str(error)
            reason = "the connection was refused" if refused else "the connection failed or was closed"
            raise EvaluationError(
                f"{self.url}: {reason} at {what}; check that the server runs and that --server is its address"
            ) from error
        except requests.RequestException as error:
            raise EvaluationError(f"{self.url}: {what} could not be sent: {self._quote(str(error))}") from error

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # Given as a function, so that requests does not send credentials of ~/.netrc instead.
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _raise_refusal(self, response: requests.Response, what: str) -> None:
        status, message = response.status_code, self._quote(_find_message(response))
        if status in (401, 403):
            state = "refuses the key in" if self._key else "wants a key; set"
            raise ConfigError(f"{self.url} {state} {self._key_variable} (status {status}: {message})")
        if status == 404 and what != "the list of models":
            raise ConfigError(
                f"{self.url}: status 404 for model {self.model!r}: {message}; name a model of the server with "
                "--server-model, or check the path of --server"
            )
        if 300 <= status < 400:
            raise ConfigError(
                f"{self.url} redirects to another address, which is not followed; give that with --server"
            )
        if status == 429:
            raise EvaluationError(
                f"{self.url} refused {what} {_MAX_TRIES} times (status 429: {message}); lower --batch-size, the "
                "number of requests at a time, or try again later"
            )
        raise EvaluationError(f"{self.url} answered {what} with status {status}: {message}")

    def _quote(self, text: str) -> str:
        """The beginning of a server's text on one line, without the key."""
        text = " ".join(text.split())
        if self._key:
            text = text.replace(self._key, "***")
        return text[:_MAX_QUOTED] or "no text"


def text_part(text: str) -> Part:
    """Returns a text as a part of a message."""
    return {"type": "text", "text": text}


def image_part(encoded: bytes) -> Part:
    """Returns an image as a part of a message.

    A plain JPEG or PNG file is sent as it is. Others are sent as PNG with the pixels that training has, because servers
    differ in how they read orientation, transparency and other formats.

    Raises:
        OSError: the image cannot be decoded.
    """
    image = Image.open(io.BytesIO(encoded))
    is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    is_plain = image.format in ("JPEG", "PNG") and image.mode == "RGB" and "transparency" not in image.info
    kind = "png" if image.format == "PNG" else "jpeg"
    if not (is_plain and is_upright):
        buffer = io.BytesIO()
        decode(encoded).save(buffer, "PNG")
        encoded, kind = buffer.getvalue(), "png"
    url = f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _check_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--server {url}: must be an address such as http://localhost:8000/v1")
    if parts.username or parts.password:
        raise ConfigError(f"--server: the address of {parts.hostname} holds a password; set {KEY_VARIABLE} instead")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def _seconds_to_wait(response: requests.Response, number: int) -> float:
    """What the server asks for in seconds, else twice as long each time; at most a minute."""
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        seconds = 2.0**number
    return min(max(seconds, 0.0), _MAX_WAIT_S)


def _list_entries(values: Any) -> list[dict[str, Any]]:
    entries = values.get("data") if isinstance(values, dict) else None
    return [each for each in entries if isinstance(each, dict) and "id" in each] if isinstance(entries, list) else []


def _find_message(response: requests.Response) -> str:
    """The server's sentence, in the places where servers put it; else its text."""
    try:
        values = response.json()
    except ValueError:
        return response.text
    error = values.get("error", values) if isinstance(values, dict) else values
    message = error.get("message", error.get("detail")) if isinstance(error, dict) else error
    return message if isinstance(message, str) else str(values)


def explain_unreadable(error: OSError, sample_id: str, source: str) -> DataError:
    """Returns the error of an image that cannot be decoded."""
    return DataError(f"an image of sample {sample_id!r} of source {source} cannot be read: {error}")
