"""What fcvm says about itself."""

import os
import sys

import pytest

from fcvm import log


@pytest.mark.parametrize("end", ["pipe", "full", "closed"])
def test_nobody_who_hears_it_is_no_error(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VM would end with the reader of its supervisor's warnings, and all clones with that of their server's."""
    if end == "pipe":
        read, write = os.pipe()
        os.close(read)
        stream = os.fdopen(write, "w")
    else:
        stream = open("/dev/full", "w")  # noqa: SIM115
    if end == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    log.warning("hello")
    monkeypatch.undo()
    if end != "closed":
        os.dup2(devnull := os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is still buffered
        os.close(devnull)
        stream.close()
