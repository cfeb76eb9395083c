"""The grammar of --publish, --forward-localhost and --dns."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcvm.errors import UsageError
from fcvm.network import spec
from fcvm.network.publish import Publish, parse, parse_all


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8080:80", [Publish("", 8080, 80)]),
        ("80", [Publish("", 0, 80)]),
        (":80", [Publish("", 0, 80)]),
        ("0:80", [Publish("", 0, 80)]),
        ("8080:80/tcp", [Publish("", 8080, 80)]),
        ("53:53/UDP", [Publish("", 53, 53, "udp")]),
        ("127.0.0.1:5353:53/udp", [Publish("127.0.0.1", 5353, 53, "udp")]),
        ("127.0.0.1::80", [Publish("127.0.0.1", 0, 80)]),
        ("127.0.0.1:0:80", [Publish("127.0.0.1", 0, 80)]),
        ("[::1]:8080:80", [Publish("::1", 8080, 80)]),
        ("[::1]::80", [Publish("::1", 0, 80)]),
        ("[0:0::1]:1:2", [Publish("::1", 1, 2)]),
        ("8000-8002:90-92", [Publish("", 8000 + n, 90 + n) for n in range(3)]),
        ("90-91", [Publish("", 0, 90), Publish("", 0, 91)]),
        ("8080:80,8443:443", [Publish("", 8080, 80), Publish("", 8443, 443)]),
        ("8080:80, 53/udp", [Publish("", 8080, 80), Publish("", 0, 53, "udp")]),
        ("80:80,80:80/udp", [Publish("", 80, 80), Publish("", 80, 80, "udp")]),
        ("127.0.0.1:80:80,192.0.2.1:80:81", [Publish("127.0.0.1", 80, 80), Publish("192.0.2.1", 80, 81)]),
        ("65535:65535", [Publish("", 65535, 65535)]),
    ],
)
def test_accepts(text: str, expected: list[Publish]) -> None:
    assert list(parse(text)) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("8080:80,", "comma"),
        ("http:80", "the host's port must be a number"),
        ("8080:http", "the guest's port must be a number"),
        ("8080:0", "from 1 to 65535"),
        ("8080:65536", "from 1 to 65535"),
        ("-1:80", "must be a number"),
        ("٣:80", "must be a number"),
        ("8080:80/sctp", "'sctp' is not a protocol"),
        ("8080:80/", "'' is not a protocol"),
        ("localhost:8080:80", "'localhost' is not an IP address"),
        ("1.2.3:8080:80", "is not an IP address"),
        ("::1:8080:80", "in brackets"),
        ("[::1:8080:80", "in brackets"),
        ("[::1]8080:80", "in brackets"),
        ("[::1]:80", "both ports"),
        ("[::1]:1:2:3", "too many colons"),
        (":8080:80", "before the first colon"),
        ("8000-8010:80", "differ in length"),
        ("8010-8000:80-90", "backwards"),
        ("0-3:80-83", "starts at 1"),
        ("8080:80,8080:81", "published twice"),
        ("8080:80,127.0.0.1:8080:81", "published twice"),
    ],
)
def test_refuses(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert says in caught.value.message
    assert caught.value.hint


def test_a_port_is_not_taken_twice_by_two_options() -> None:
    with pytest.raises(UsageError, match="published twice"):
        parse_all(["8080:80", "8080:81"])
    assert len(parse_all(["8080:80", "8080:81/udp"])) == 2


ports = st.builds(
    Publish,
    st.sampled_from(["", "127.0.0.1", "0.0.0.0", "::1", "::", "2001:db8::1"]),
    st.integers(0, 65535),
    st.integers(1, 65535),
    st.sampled_from(["tcp", "udp"]),
)


@given(ports)
def test_what_is_shown_can_be_given_again(publish: Publish) -> None:
    assert parse(str(publish)) == (publish,)


@given(st.text(alphabet="0123456789:-/,[]. tcpudpx", max_size=24))
def test_anything_else_is_a_usage_error(text: str) -> None:
    with suppress(UsageError):
        for publish in parse(text):
            assert 0 <= publish.host_port <= 65535
            assert 1 <= publish.guest_port <= 65535


def test_a_spec() -> None:
    made = spec.parse("bridged", ["8080:80", "53/udp"], ["5432,53/udp"], ["192.0.2.53, ::1"])
    assert made.mode == "bridged"
    assert [str(p) for p in made.publish] == ["8080:80/tcp", "0:53/udp"]
    assert [str(p) for p in made.forward_localhost] == ["5432/tcp", "53/udp"]
    assert made.dns == ("192.0.2.53", "::1")


def test_the_default_mode_is_one_that_this_user_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert spec.parse().mode == "bridged"
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert spec.parse().mode == "rootless"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mode": "host"}, "no network mode 'host'"),
        ({"mode": "none", "publish": ["80"]}, "--publish needs a network"),
        ({"mode": "none", "forward_localhost": ["80"]}, "--forward-localhost needs a network"),
        ({"mode": "bridged", "forward_localhost": ["0"]}, "not a port"),
        ({"mode": "bridged", "forward_localhost": ["80/sctp"]}, "not a port"),
        ({"mode": "bridged", "forward_localhost": [""]}, "not a port"),
        ({"mode": "bridged", "dns": ["dns.example"]}, "not an IP address"),
    ],
)
def test_a_spec_that_cannot_be(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        spec.parse(**arguments)  # type: ignore[arg-type]
    assert says in caught.value.message
    assert caught.value.hint
