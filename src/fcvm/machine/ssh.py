"""OpenSSH into the machine: a key pair for us, one for the machine, and one connection that everything shares.

Both pairs are made once, so the machine's key is known before it boots. The connection (a ControlMaster, child of the
keeper) forwards a Unix socket of the runtime directory to the machine's session server; ``fcvm machine ssh`` rides on it.
"""

import os
from pathlib import Path

from fcvm import process
from fcvm.machine.state import Places

ALIAS = "fcvm-machine"
SESSION_SOCKET = "/run/fcvm/session.sock"  # fc_agent/machine.py


def make_keys(places: Places) -> None:
    """Make the key pairs that are missing; a half-made one is made anew. Raises HostError: ssh-keygen is missing."""
    for path in (places.key, places.host_key):
        public = path.with_suffix(".pub")
        if path.exists() and public.exists():
            continue
        temporary = path.with_suffix(".creating")
        for leftover in (temporary, temporary.with_name(temporary.name + ".pub")):
            leftover.unlink(missing_ok=True)
        keygen = process.find("ssh-keygen", package="openssh-client")
        process.run([keygen, "-q", "-t", "ed25519", "-N", "", "-C", ALIAS, "-f", temporary])
        os.replace(temporary.with_name(temporary.name + ".pub"), public)
        os.replace(temporary, path)


def write_config(places: Places, port: int) -> None:
    """Write the client's configuration for the machine whose sshd is at ``port`` of the loopback."""
    known_hosts = places.runtime / "known_hosts"
    known_hosts.write_text(f"{ALIAS} {places.host_key.with_suffix('.pub').read_text()}")
    options = {
        "HostName": "127.0.0.1",
        "Port": str(port),
        "User": "root",
        "HostKeyAlias": ALIAS,
        "IdentityFile": _quoted(places.key),
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "UserKnownHostsFile": _quoted(known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "BatchMode": "yes",
        "ControlPath": _quoted(places.ssh),
        "StreamLocalBindUnlink": "yes",
        "StreamLocalBindMask": "0177",
        "LogLevel": "ERROR",
        # The machine's emulated CPU is the bottleneck: of the ciphers, this one costs it least.
        "Ciphers": "aes128-gcm@openssh.com,aes128-ctr",
        "Compression": "no",
    }
    places.ssh_config.write_text(f"Host {ALIAS}\n" + "".join(f"  {name} {value}\n" for name, value in options.items()))


def _quoted(path: Path) -> str:
    """A path in ssh_config: quoted, as it may hold spaces, and with ``%`` doubled."""
    return '"' + str(path).replace("%", "%%") + '"'


def master_command(places: Places) -> list[str]:
    """The command line of the shared connection; it stays in the foreground."""
    forward = f"{places.session}:{SESSION_SOCKET}"
    return [_ssh(), "-F", str(places.ssh_config), "-M", "-N", "-o", "ExitOnForwardFailure=yes", "-L", forward, ALIAS]


def command(places: Places, words: list[str], *, terminal: bool) -> list[str]:
    """The command line that runs ``words`` in the machine, or a login shell; with ``terminal`` on a terminal."""
    return [_ssh(), "-F", str(places.ssh_config), *(["-t"] if terminal else []), ALIAS, *(["--", *words] if words else [])]


def _ssh() -> str:
    return process.find("ssh", package="openssh-client")
