"""Tap devices (``linux/if_tun.h``)."""

import fcntl
import os
import struct

from fcvm.errors import HostError

TUN = "/dev/net/tun"
TUNSETIFF = 0x400454CA
TUNSETPERSIST = 0x400454CB
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000


def create(name: str, *, vnet_header: bool = True) -> None:
    """Make a tap that stays until its namespace goes, in the calling thread's network namespace.

    Arguments:
        vnet_header: whoever attaches will prepend a virtio-net header (Firecracker does, slirp4netns does not).

    Raises:
        HostError: this host has no /dev/net/tun.
        OSError: CAP_NET_ADMIN is missing, or the name is taken.
    """
    fd = attach(name, vnet_header=vnet_header)
    try:
        fcntl.ioctl(fd, TUNSETPERSIST, 1)
    finally:
        os.close(fd)


def attach(name: str, *, vnet_header: bool = True) -> int:
    """An fd that reads what the tap sends and writes what it receives; the tap is made if it is missing.

    Raises:
        HostError: this host has no /dev/net/tun.
        OSError: EBUSY if somebody else is attached; EPERM without CAP_NET_ADMIN.
    """
    try:
        fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise HostError(f"{TUN} does not exist: this host has no tap devices.", hint="sudo modprobe tun") from error
    except PermissionError as error:
        raise HostError(f"{TUN} may not be opened.", hint=f"sudo chmod 0666 {TUN}") from error
    except OSError as error:  # ENODEV, ENXIO: the node is there, the driver is not
        raise HostError(f"{TUN} does not work: {error.strerror}.", hint="sudo modprobe tun") from error
    try:
        flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if vnet_header else 0)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except BaseException:
        os.close(fd)
        raise
    return fd
