"""Takes over an image disk that another fcvm made: the machine's, of one that its host made.

Images are fetched and converted where the user is, with the user's credentials and files. The machine sees that disk
through its mount of the host and copies it once, so that VMs read it at the speed of the machine's own disk.
"""

import errno
from pathlib import Path

from fcvm.errors import HostError, NotFoundError
from fcvm.images import store, work
from fcvm.linux import files
from fcvm.storage.layout import Layout, locked


def adopt(path: Path, layout: Layout) -> Path:
    """The image disk in ``layout`` that is the same as the one at ``path``; copied, with its metadata, when missing.

    Raises:
        NotFoundError: there is none at ``path``.
        HostError: it cannot be copied.
    """
    ours = store.disk_path(layout, path.stem)
    if ours.exists():
        return ours
    metadata = store.read_metadata(path)
    if metadata is None:
        raise NotFoundError(f"There is no image disk at {path}.", hint="fcvm images ls")
    with locked(layout.cache / "locks" / path.stem[:2]), work.directory(layout) as scratch:
        if ours.exists():
            return ours
        try:
            copy = scratch / path.name
            files.clone(path, copy, mode=0o644)
            if copy.stat().st_size != metadata.size_bytes:
                raise HostError(
                    f"The image disk {path} is incomplete.", hint="fcvm images rm it and pull or load it again"
                )
            store.put(layout, path.stem, copy, metadata)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise HostError(
                f"The image disk {path} cannot be copied to {layout.images}: {error.strerror}.",
                hint="fcvm images prune" if full else f"ls -l {path}",
            ) from error
    return ours
