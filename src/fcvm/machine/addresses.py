"""QEMU's user network; apart from 10.0.2.0/24, which is the inside of every microVM."""

NETWORK, PREFIX, ADDRESS, GATEWAY, DNS = "192.168.127.0", 24, "192.168.127.15", "192.168.127.2", "192.168.127.3"
