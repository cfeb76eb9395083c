"""Makes the data directory a place where copies cost nothing: one with reflinks.

A directory that has them (btrfs, xfs) is used as it is. Elsewhere root gets a loopback btrfs: a sparse file beside the
directory (``/mnt/fcvm-btrfs.img``), mounted on it. Everyone else, and a directory that already holds data, works by
sparse copies: slower, and more space for snapshots and clones.

    BASE.img           the btrfs, if one was made; grows when ``storage_size`` does; free space goes back to the host
    .BASE.lock         held while it is made or mounted
"""

import os
import shutil
from pathlib import Path

from fc_agent.structs import Struct
from fcvm import process
from fcvm.errors import FcvmError, HostError
from fcvm.linux import files
from fcvm.setup.progress import Progress, Step
from fcvm.storage.layout import locked

MINIMUM_MIB = 256  # mkfs.btrfs needs a little over 100
MOUNT_OPTIONS = "noatime,discard=async"  # discard: deleted files give their space back to the host


class Storage(Struct):
    """What the data directory is: ``kind`` is ``"reflink"``, ``"loopback"`` (a btrfs of ours) or ``"copies"``."""

    kind: str
    detail: str


def image_of(base: Path) -> Path:
    """The file that holds the loopback btrfs of ``base``."""
    return base.with_name(base.name + ".img")


def reflinks(directory: Path) -> bool:
    """Whether files in ``directory`` can share their blocks; found out by trying. False where we may not write."""
    try:
        source = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        destination = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(source, b"\0" * 4096)
            return files.reflink(source, destination)
        except OSError:
            return False
        finally:
            os.close(destination)
    finally:
        os.close(source)


def examine(base: Path) -> Storage:
    """What ``base`` is now, changing nothing."""
    if base.is_dir() and reflinks(base):
        if os.path.ismount(base) and image_of(base).exists():
            return Storage("loopback", f"btrfs in {image_of(base)}")
        return Storage("reflink", "the file system shares blocks of copies")
    return Storage("copies", "the file system has no reflinks: disks and snapshots are copied, holes left out")


def ensure(base: Path, size_mib: int, progress: Progress) -> Storage:
    """Make ``base``, with reflinks if that is possible, and tell what it is.

    Arguments:
        size_mib: size of a loopback btrfs; one that is there already is enlarged, never shrunk.

    Raises:
        HostError: the directory cannot be made; or it lies unmounted in its image, and cannot be mounted.
    """
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(
            f"The data directory {base} cannot be made: {error.strerror}.", hint="FCVM_BASE_DIR=DIRECTORY fcvm setup"
        ) from error
    before = examine(base)
    wanted = needs_loopback(base) if before.kind == "copies" else too_small(base, size_mib)
    if not wanted or os.geteuid() != 0:
        return before
    with progress.step("Storage") as step, locked(base.with_name(f".{base.name}.lock")):
        if examine(base).kind == "copies" and needs_loopback(base):  # still: others may have used it meanwhile
            if not image_of(base).exists():
                create(base, size_mib, step)
            mount(base)
        if too_small(base, size_mib):
            enlarge(base, size_mib)
    return examine(base)


def needs_loopback(base: Path) -> bool:
    """Whether to mount a loopback btrfs on ``base``: one was made before, or it is empty (nothing may be hidden)."""
    return image_of(base).exists() or not any(base.iterdir())


def too_small(base: Path, size_mib: int) -> bool:
    image = image_of(base)
    return image.exists() and os.path.ismount(base) and image.stat().st_size < size_mib << 20


def create(base: Path, size_mib: int, step: Step) -> None:
    """Make the image with an empty btrfs."""
    image = image_of(base)
    temporary = image.with_name(image.name + ".creating")
    step.note(f"making a btrfs in {image}")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            os.truncate(file.fileno(), max(size_mib, MINIMUM_MIB) << 20)
        process.run([process.find("mkfs.btrfs", package="btrfs-progs"), "-q", "-L", "fcvm", temporary])
        os.rename(temporary, image)
    except OSError as error:
        raise HostError(f"The file {image} cannot be made: {error.strerror}.", hint=f"df -h {image.parent}") from error
    finally:
        temporary.unlink(missing_ok=True)


def mount(base: Path) -> None:
    """Mount the image of ``base``.

    Raises:
        HostError: the kernel has no loop device or no btrfs, or the image is damaged.
    """
    try:
        process.run(["mount", "-t", "btrfs", "-o", f"loop,{MOUNT_OPTIONS}", image_of(base), base])
    except FcvmError as error:
        raise HostError(
            f"The data directory's btrfs cannot be mounted: {error.message}",
            hint=f"FCVM_BASE_DIR=DIRECTORY chooses another place; `rm {image_of(base)}` loses what is in this one",
        ) from error


def remount(base: Path) -> bool:
    """Mount the btrfs of ``base`` again, as after a reboot; False if that is not what is missing, or we are not root."""
    if os.geteuid() != 0 or not image_of(base).exists() or not base.is_dir() or os.path.ismount(base):
        return False
    with locked(base.with_name(f".{base.name}.lock")):
        if not os.path.ismount(base):
            mount(base)
    return True


def enlarge(base: Path, size_mib: int) -> None:
    """Let the mounted btrfs grow to ``size_mib``."""
    image = image_of(base)
    os.truncate(image, size_mib << 20)
    source = process.run(["findmnt", "-n", "-o", "SOURCE", "--target", base]).stdout.decode().strip()
    process.run(["losetup", "-c", source])
    process.run([process.find("btrfs", package="btrfs-progs"), "filesystem", "resize", "max", base])


def free(base: Path) -> int:
    """Bytes free in the data directory; of a loopback btrfs no more than its host file system has."""
    available = shutil.disk_usage(base).free
    image = image_of(base)
    return min(available, shutil.disk_usage(image.parent).free) if image.exists() else available
