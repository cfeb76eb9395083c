"""Published ports: what ``--publish`` says.

[HOSTIP:]HOSTPORT:GUESTPORT[/tcp|udp]

8080:80              every address of the host, TCP
127.0.0.1:5353:53/udp
[::1]:8080:80        an IPv6 address goes in brackets
8000-8010:9000-9010  ranges of the same length
0:80, :80, 80        any free port of the host; `fcvm ls` shows which
8080:80,8443:443     several, with commas; the option may also be repeated
"""

import ipaddress
from collections.abc import Callable, Iterable, Iterator

from fc_agent.structs import Struct
from fcvm.errors import UsageError

HINT = "--publish takes [HOSTIP:]HOSTPORT:GUESTPORT[/tcp|udp], for example 8080:80 or 127.0.0.1:5353:53/udp"
PROTOCOLS = ("tcp", "udp")


class Publish(Struct):
    """One port. ``host_ip`` is empty for every address of the host; ``host_port`` 0 stands for any free one."""

    host_ip: str
    host_port: int
    guest_port: int
    protocol: str = "tcp"

    def __str__(self) -> str:
        ip = f"[{self.host_ip}]" if ":" in self.host_ip else self.host_ip
        return f"{ip}{':' if ip else ''}{self.host_port}:{self.guest_port}/{self.protocol}"


def parse(text: str) -> tuple[Publish, ...]:
    """The ports in one value of ``--publish``.

    Raises:
        UsageError: it is not of the form above, or it asks twice for the same port of the host.
    """
    found = tuple(publish for word in text.split(",") for publish in _parse_one(word.strip(), text))
    check(found)
    return found


def parse_all(texts: Iterable[str]) -> tuple[Publish, ...]:
    """The ports in all the values of a repeated ``--publish``; raises as ``parse`` does."""
    found = tuple(publish for text in texts for publish in parse(text))
    check(found)
    return found


def check(published: Iterable[Publish]) -> None:
    """See that no port of the host is asked for twice.

    Raises:
        UsageError: one is.
    """
    seen: dict[tuple[str, int], list[Publish]] = {}
    for publish in published:
        if publish.host_port == 0:
            continue
        others = seen.setdefault((publish.protocol, publish.host_port), [])
        for other in others:
            if publish.host_ip == other.host_ip or not publish.host_ip or not other.host_ip:
                raise UsageError(
                    f"Port {publish.host_port}/{publish.protocol} is published twice: {other} and {publish}.",
                    hint=f"give one of them another port, or leave it out for any free one: {publish.guest_port}",
                )
        others.append(publish)


def _parse_one(word: str, whole: str) -> Iterator[Publish]:
    def wrong(reason: str) -> UsageError:
        return UsageError(f"--publish {whole}: {reason}.", hint=HINT)

    if not word:
        raise wrong("there is nothing before or after a comma" if "," in whole else "it is empty")
    rest, slash, protocol = word.partition("/")
    protocol = protocol.lower() if slash else "tcp"
    if protocol not in PROTOCOLS:
        raise wrong(f"{protocol!r} is not a protocol that can be published; tcp and udp are")

    host_ip = ""
    if rest.startswith("["):
        host_ip, bracket, rest = rest[1:].partition("]")
        if not bracket or not rest.startswith(":"):
            raise wrong("an IPv6 address is written in brackets and followed by a colon")
        rest = rest[1:]
        if ":" not in rest:
            raise wrong("after an address both ports are needed (leave the first empty for any free one)")
    elif rest.count(":") == 2:
        host_ip, _, rest = rest.partition(":")
        if not host_ip:
            raise wrong("the address before the first colon is empty")
    elif rest.count(":") > 2:
        raise wrong("an IPv6 address is written in brackets, as in [::1]:8080:80")
    if host_ip:
        try:
            address = ipaddress.ip_address(host_ip)
        except ValueError:
            raise wrong(f"{host_ip!r} is not an IP address of this host") from None
        host_ip = str(address)
    host_text, colon, guest_text = rest.rpartition(":")
    if colon and ":" in host_text:
        raise wrong("it has too many colons")

    guest_ports = _ports(guest_text, "the guest's port", wrong)
    if guest_ports[0] == 0:
        raise wrong("the guest's port must be from 1 to 65535")
    if host_text in ("", "0"):
        host_ports: list[int] | range = [0] * len(guest_ports)
    else:
        host_ports = _ports(host_text, "the host's port", wrong)
        if host_ports[0] == 0:
            raise wrong("a range of ports starts at 1")
    if len(host_ports) != len(guest_ports):
        raise wrong(f"the ranges differ in length ({len(host_ports)} and {len(guest_ports)} ports)")
    for host_port, guest_port in zip(host_ports, guest_ports, strict=True):
        yield Publish(host_ip, host_port, guest_port, protocol)


def _ports(text: str, what: str, wrong: Callable[[str], UsageError]) -> range:
    first, dash, last = text.partition("-")
    words = [first, last] if dash else [first]
    for word in words:
        # isdecimal alone accepts the digits of other scripts
        if not (word.isascii() and word.isdecimal()) or len(word) > 5 or int(word) > 65535:
            raise wrong(f"{what} must be a number from 1 to 65535, or two with a dash, not {text!r}")
    numbers = [int(word) for word in words]
    if numbers[-1] < numbers[0]:
        raise wrong(f"the range {text} runs backwards")
    return range(numbers[0], numbers[-1] + 1)
