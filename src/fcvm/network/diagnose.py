"""What a host lacks for a mode of networking, found out by trying: for ``fcvm doctor``."""

import os

from fcvm import process
from fcvm.errors import FcvmError, HostError, NetworkError
from fcvm.linux import namespaces, nft, tap
from fcvm.linux.netlink import NetlinkError
from fcvm.network import guest, inner

_PROBE = "fcvm-probe"


def problems(mode: str) -> list[FcvmError]:
    """Everything that stands in the way of ``--network MODE``, each with its hint; nothing if it will work.

    What is tried happens in a namespace that is gone afterwards; the host's own network is not touched.
    """
    found: list[FcvmError] = []
    if mode == "bridged" and os.geteuid() != 0:
        return [NetworkError("Bridged networking needs root.", hint="sudo fcvm ..., or --network rootless")]
    if mode == "rootless":
        try:
            process.find("slirp4netns")
        except HostError as error:
            found.append(error)
    user = mode == "rootless" or os.geteuid() != 0
    try:
        namespace, _ = namespaces.create(lambda: _try(mode), user=user)
        namespace.close()
    except FcvmError as error:
        found.append(error)
    except OSError as error:
        found.append(NetworkError(f"A network cannot be set up on this host: {error.strerror or error}."))
    return found


def _try(mode: str) -> list[int]:
    tap.create(guest.TAP)
    if mode != "none":
        batch = nft.Batch()
        batch.table(_PROBE, owner=mode == "bridged")
        batch.chain(_PROBE, "nat", type="nat", hook=nft.PREROUTING, priority=nft.DSTNAT)
        batch.rule(_PROBE, "nat", nft.iifname(inner.UPLINK), nft.dport("tcp", 1), nft.dnat(guest.ADDRESS.ip, 1))
        batch.rule(_PROBE, "nat", nft.to_this_host(), nft.ct_dnat(), nft.verdict(nft.ACCEPT))
        try:
            with nft.open_socket() as sock:
                batch.commit(sock)
        except (NetlinkError, OSError) as error:
            raise NetworkError(
                f"This host's kernel ({os.uname().release}) lacks nftables with translation: {error.strerror}.",
                hint="sudo modprobe -a nf_tables nft_chain_nat nft_nat nft_masq nft_fib_inet",
            ) from error
    return []
