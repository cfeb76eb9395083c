"""This system's own address; for whoever tells a VM, or the machine, where its host is."""

import socket
from ipaddress import IPv4Address, ip_address

# any address that only a default route leads to; nothing is sent there
FAR = {4: ip_address("198.41.0.4"), 6: ip_address("2001:503:ba3e::2:30")}


def own() -> IPv4Address | None:
    """Our address towards the world, without a packet being sent; None if there is only that of the loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((str(FAR[4]), 9))
            found = IPv4Address(sock.getsockname()[0])
        except OSError:
            return _any()
    return None if found.is_loopback else found


def _any() -> IPv4Address | None:
    """Where no route leads to the world: any address of an interface."""
    from fcvm.linux import rtnetlink

    with rtnetlink.open_socket() as route:
        own = [interface.ip for _, interface in rtnetlink.addresses(route)]
    return next((ip for ip in own if isinstance(ip, IPv4Address) and not ip.is_loopback), None)
