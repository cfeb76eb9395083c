"""Fetches a file by URL into a place of our own, verified by its SHA-256."""

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from fcvm.errors import SetupError
from fcvm.setup.progress import Step

TIMEOUT = 30.0  # seconds without a byte
BLOCK = 1 << 20


def fetch(url: str, destination: Path, *, step: Step, sha256: str | None, by_hand: str) -> None:
    """Write what ``url`` (http, https or file) holds to ``destination``, which is left incomplete after an error.

    Arguments:
        sha256: what the content must hash to, in hexadecimal; None leaves the check to the caller.
        by_hand: the hint for a user who cannot reach the URL.

    Raises:
        SetupError: it cannot be fetched or is another file than expected; the message names the URL.
    """
    step.note(f"fetching {urlsplit(url).path.rpartition('/')[2]}")
    digest = hashlib.sha256()
    done = 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response, destination.open("wb") as file:
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            while block := response.read(BLOCK):
                digest.update(block)
                file.write(block)
                done += len(block)
                step.update(done, total)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise SetupError(f"{url} cannot be fetched: {reason(error)}.", hint=by_hand) from error
    if total is not None and done != total:
        raise SetupError(f"{url} cannot be fetched: it ended after {done} of {total} bytes.", hint=by_hand)
    if sha256 is not None and digest.hexdigest() != sha256.lower():
        raise SetupError(
            f"{url} is not the file expected: its SHA-256 is {digest.hexdigest()} instead of {sha256.lower()}.",
            hint=by_hand,
        )


def reason(error: Exception) -> str:
    """Why a transfer failed, in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__
