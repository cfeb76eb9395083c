"""Asks the local Docker daemon which image a name stands for, without copying the image."""

import http
import http.client
import json
import os
import socket
from collections.abc import Mapping
from urllib.parse import quote

DEFAULT_HOST = "unix:///var/run/docker.sock"
TIMEOUT = 10.0  # seconds


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self._path)


def image_id(name: str, env: Mapping[str, str] = os.environ) -> str:
    """The id of the daemon's image ``name``; empty if that cannot be told (skopeo then says why).

    Docker's Engine API, "Inspect an image".
    """
    host = env.get("DOCKER_HOST") or DEFAULT_HOST
    if not host.startswith("unix://"):
        return ""
    connection = _Connection(host.removeprefix("unix://"))
    try:
        connection.request("GET", f"/images/{quote(name)}/json")
        response = connection.getresponse()
        content = response.read()
        return str(json.loads(content)["Id"]) if response.status == http.HTTPStatus.OK else ""
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return ""
    finally:
        connection.close()
