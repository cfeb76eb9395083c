"""Unpacks an OCI archive to the directory layout in it.

skopeo would unpack it with the owners that the archive names, which only root may do.
"""

import gzip
import lzma
import os
import re
import shutil
import tarfile
import zlib
from pathlib import Path

from fc_agent.structs import replace
from fcvm.errors import ImageError
from fcvm.images import tars
from fcvm.images.reference import Reference

# What Python says of a tar that is damaged; bz2 says it by an OSError without a number.
UNREADABLE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RecursionError)

FILES = re.compile(r"oci-layout|index\.json|blobs/[a-z0-9]+/[a-f0-9]+")


def unpack(archive: Reference, directory: Path) -> Reference:
    """Unpack what an OCI layout consists of, and nothing else, to ``directory``; returns the reference of the same image there.

    Raises:
        ImageError: it is no tar, or a damaged one.
    """
    directory.mkdir()
    try:
        for member, content in tars.archive(Path(archive.path)):
            name = os.path.normpath(member.name)
            if content is not None and not member.issparse() and FILES.fullmatch(name):
                target = directory / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
    except (*UNREADABLE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # no space left, for example
            raise
        raise ImageError(
            f"{archive.path} is damaged, or not an OCI archive.", hint=f"tar -tf {archive.path}"
        ) from error
    suffix = archive.location.removeprefix(archive.path)
    return replace(archive, transport="oci", location=f"{directory}{suffix}", path=str(directory))
