"""`fcvm ls`: the VMs."""

from __future__ import annotations

import argparse
import json
import time

from fcvm.cli.context import Context
from fcvm.cli.values import number
from fcvm.vm import state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

WHERE = "vms"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="an array of objects; docs/json.md describes the fields")
    parser.add_argument("--pid", metavar="PID", help="only the VM with this pid")
    parser.add_argument("--all", "-a", action="store_true", help="also VMs that have ended and were kept by --no-rm")


def prepare(args: argparse.Namespace, context: Context) -> None:
    if args.pid is not None:
        args.pid = number(args.pid, "--pid", least=1)


def run(args: argparse.Namespace, context: Context) -> int:
    state.sweep(context.layout)
    found = [
        record
        for record in state.records(context.layout)
        if (args.pid is None or record.pid == args.pid) and (args.all or state.is_alive(context.layout, record.id))
    ]
    if args.json:
        print(json.dumps([record.public() for record in found], indent=2))
    else:
        rows: list[tuple[str, ...]] = [
            ("NAME", "STATUS", "HEALTH", "CPU", "MEM", "NETWORK", "PORTS", "VOLUMES", "IMAGE", "CREATED", "PID")
        ]
        rows += [_row(record) for record in found]
        print(table(rows))
    return 0


def _row(record: state.Record) -> tuple[str, ...]:
    status = record.status if record.exit_code is None else f"{record.status} ({record.exit_code})"
    network = record.network
    return (
        record.name,
        status,
        record.health,
        str(record.cpu),
        f"{record.memory_mib}M",
        f"{network.get('mode', 'none')}" + (f" {network['host_ip']}" if network.get("host_ip") else ""),
        ",".join(_port(port) for port in network.get("ports", [])) or "-",
        ",".join(volume["guest"] + ":ro" * volume["read_only"] for volume in record.volumes) or "-",
        record.image,
        age(time.time() - record.created_at),
        str(record.pid),
    )


def _port(port: dict[str, Any]) -> str:
    host = f"{port['host_ip']}:" if port.get("host_ip") else ""
    protocol = "/udp" if port.get("protocol") == "udp" else ""
    note = " (loopback only)" if port.get("loopback_only") else ""
    return f"{host}{port.get('host_port')}->{port.get('guest_port')}{protocol}{note}"


def age(seconds: float) -> str:
    """``seconds`` as one rounded number: 42s, 5m, 3h, 2d."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(int(seconds), 0)}s"


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows in aligned columns, two spaces apart. By hand: importing rich costs twice what a whole `ls` may.

    What a terminal would take for a command is shown as ``?``: some of it comes from guests.
    """
    rows = [tuple("".join(c if c.isprintable() else "?" for c in cell) for cell in row) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
