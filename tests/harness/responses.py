"""Send requests that no client library would send, and check the format of errors."""

import json
import socket
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit

import requests

from harness.services import Service


def connect(url: str, timeout: float = 60) -> socket.socket:
    """Connect to the host and port of `url`."""
    where = urlsplit(url)
    return socket.create_connection((str(where.hostname), int(where.port or 0)), timeout=timeout)


def raw_answer(service: Service, request: bytes) -> requests.Response:
    """Send these bytes; return the answer as a requests.Response."""
    with connect(service.url) as connection:
        connection.sendall(request)
        answer = HTTPResponse(connection)
        answer.begin()
        response = requests.Response()
        response.status_code = answer.status
        response.headers.update(answer.getheaders())
        response._content = answer.read()
        return response


def assert_error(response: Any, status: int, code: str) -> str:
    """Check the shape that all errors share; return the message."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    body = json.loads(response.content)
    assert body["success"] is False
    assert set(body["error"]) == {"code", "message"}
    assert body["error"]["code"] == code
    message: str = body["error"]["message"]
    assert message.endswith(".")
    assert "\n" not in message
    assert "Traceback" not in message
    return message
