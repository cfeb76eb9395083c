"""The writable disk of a VM: a sparse ext4 image, cloned from a formatted template."""

import os
from pathlib import Path

from fcvm.errors import HostError
from fcvm.linux import files
from fcvm.process import run
from fcvm.storage.layout import Layout
from fcvm.storage.publish import publish

# No journal: the disk lives as long as its VM, and a snapshot is taken of a paused VM together with its memory.
# Lazy initialisation keeps the template sparse; no reserved blocks, since only root writes to it.
MKFS = ("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1,nodiscard")


def scratch_template(layout: Layout, size: int) -> Path:
    """A formatted, empty ext4 image of ``size`` MiB; made once per size."""
    template = layout.cache / f"scratch-{size}m.img"
    if not template.exists():
        with publish(template) as temporary:
            if not template.exists():
                with open(temporary, "wb") as file:
                    os.truncate(file.fileno(), size << 20)
                run([*MKFS, temporary])
    return template


def make_scratch(layout: Layout, size: int, destination: Path) -> None:
    """Put an empty writable disk of ``size`` MiB at ``destination``.

    Raises:
        HostError: the data directory is full.
    """
    clone(scratch_template(layout, size), destination)


def clone(source: Path, destination: Path) -> None:
    """Clone a disk image; a full data directory is a HostError that says so."""
    try:
        files.clone(source, destination)
    except OSError as error:
        raise HostError(
            f"The disk {destination.name} cannot be made in {destination.parent}: {error.strerror}.",
            hint=f"df -h {destination.parent}; fcvm images prune",
        ) from error
