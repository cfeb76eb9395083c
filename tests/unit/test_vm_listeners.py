"""Which ports a guest listens on, as the kernel prints it."""

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from fcvm.vm.listeners import parse

TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 00000000:0051 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0 100 0 0 10 0
   2: 0100007F:0051 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 3 1 0 100 0 0 10 0
   3: 0100007F:0052 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 4 1 0 100 0 0 10 0
  sl  local_address                         remote_address                        st tx_queue rx_queue
   0: 00000000000000000000000001000000:0053 00000000000000000000000000000000:0000 0A 00000000:00000000
   1: 00000000000000000000000000000000:0054 00000000000000000000000000000000:0000 0A 00000000:00000000
   2: 0000000000000000FFFF00000100007F:0055 00000000000000000000000000000000:0000 0A 00000000:00000000
"""


def test_addresses_of_the_loopback_are_told_from_others() -> None:
    assert parse(TABLE) == {80: {True}, 81: {False, True}, 83: {True}, 84: {False}, 85: {True}}


@pytest.mark.parametrize(("ip", "loopback"), [("127.0.0.1", True), ("0.0.0.0", False), ("::1", True), ("::", False)])
def test_what_this_kernel_prints(ip: str, loopback: bool) -> None:
    with ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET))
        sock.bind((ip, 0))
        sock.listen()
        text = "".join(Path(f"/proc/self/net/{name}").read_text() for name in ("tcp", "tcp6"))
        assert loopback in parse(text)[sock.getsockname()[1]]
