"""The files of Debian packages, with what they depend on, without running anything of theirs."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import archive

from fcvm import process
from fcvm.config import Config
from fcvm.errors import ImageError
from fcvm.setup import sources

# What no container needs: documentation, translations, the package manager's own files, /dev.
UNWANTED = (
    "dev/", "boot/", "proc/", "sys/", "run/", "etc/apt/", "etc/dpkg/", "etc/fstab", "etc/hostname", "etc/resolv.conf",
    "etc/init.d/", "etc/logrotate.d/", "usr/lib/systemd/", "usr/share/apport/", "usr/share/bash-completion/",
    "usr/share/debconf/", "usr/share/doc/", "usr/share/lintian/", "usr/share/locale/", "usr/share/man/",
    "usr/share/perl5/", "usr/share/pixmaps/", "usr/share/vim/", "var/cache/", "var/lib/apt/", "var/lib/dpkg/", "var/log/",
)  # fmt: skip
UNWANTED_PARTS = ("/gconv/",)
# /bin and its like are links into /usr, which the package base-files has; this is all that is needed of it.
MERGED_USR = [archive.symlink(name, f"usr/{name}") for name in ("bin", "lib", "lib64", "sbin")]
STATIC_BUSYBOX = (Path("/bin/busybox"), Path("/usr/bin/busybox"))
PT_INTERP = 3


def files(names: list[str], config: Config) -> list[archive.File]:
    """The files of the packages ``names`` of the Debian release ``config.debian_suite`` and of what they need."""
    mirrors = sources.mirrors(sources.read())
    if config.debian_mirror:
        mirrors = sources.Mirrors(config.debian_mirror, None)
    if mirrors is None:
        raise ImageError("This host's apt knows no Debian mirror.", hint="FCVM_DEBIAN_MIRROR=URL examples/build ...")
    command = [process.find("mmdebstrap"), "--quiet", "--variant=extract", "--format=tar", f"--include={','.join(names)}",
               "--aptopt=Apt::Install-Recommends false", "--dpkgopt=path-exclude=/usr/share/doc/*", config.debian_suite, "-", "-"]  # fmt: skip
    lines = "\n".join(sources.lines(mirrors, config.debian_suite)) + "\n"
    tar = process.run(command, input=lines.encode(), env={"SOURCE_DATE_EPOCH": "0"}).stdout
    return [*MERGED_USR, *_wanted(tar)]


def busybox() -> Path:
    """This host's static busybox, whose programs the images get."""
    for path in STATIC_BUSYBOX:
        if path.is_file() and is_static(path.read_bytes()):
            return path
    raise ImageError("This host has no static busybox, which the images take.", hint="apt-get install busybox-static")


def is_static(program: bytes) -> bool:
    """Whether an ELF program (64 bit, little endian) needs no dynamic linker: it has no PT_INTERP header (elf(5))."""
    if program[:6] != b"\x7fELF\x02\x01":
        return False
    start = int.from_bytes(program[32:40], "little")
    size, count = int.from_bytes(program[54:56], "little"), int.from_bytes(program[56:58], "little")
    types = {int.from_bytes(program[start + i * size :][:4], "little") for i in range(count)}
    return PT_INTERP not in types


def _wanted(content: bytes) -> Iterator[archive.File]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            name = os.path.normpath(member.name)
            path = f"{name}/" if member.isdir() else name
            if name == "." or path.startswith(UNWANTED) or any(part in path for part in UNWANTED_PARTS):
                continue
            data = _content(tar, member) if member.isreg() else b""
            pax = {key: value for key, value in member.pax_headers.items() if key.startswith("SCHILY.xattr.")}
            link = os.path.normpath(member.linkname) if member.islnk() else member.linkname
            yield archive.File(name, data, member.mode, member.type, link, member.uid, member.gid, pax)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()
