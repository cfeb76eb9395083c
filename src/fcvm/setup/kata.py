"""Provides the kernel of profile ``kata``; that of profile ``debian`` comes along with the guest image (guest.py).

It is the kernel of a Kata Containers static release: an archive whose ``opt/kata/share/kata-containers/vmlinux.container`` (or the newest
``vmlinux-VERSION``) is an ELF kernel with everything built in:

    kernels/<key>.json               index.Kata
    kernels/<id>/vmlinux
"""

import gzip
import lzma
import posixpath
import re
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fcvm.config import Config
from fcvm.errors import SetupError
from fcvm.process import failure, spawn
from fcvm.setup import download, index, keys, workspace
from fcvm.setup.index import Kata
from fcvm.setup.progress import Progress, Step
from fcvm.storage.layout import Layout

KATA_DIRECTORY = "opt/kata/share/kata-containers"
KATA_SPACE = 2 << 30


def build(config: Config, layout: Layout, progress: Progress) -> Kata:
    """The kata kernel for these settings, fetched unless it is there.

    Raises:
        SetupError: the archive cannot be fetched, is not the one expected, or holds no kernel.
    """
    url, sha256 = index.kata_archive(config)
    pointer = index.kata_pointer(config, layout.base)
    with progress.step("Kata kernel") as step, workspace.building(layout, f"kernel-{pointer.stem}", step) as work:
        kernel = index.kata(config, layout.base)
        if kernel is None:
            workspace.require_space(layout.base, KATA_SPACE)
            file = work / url.rpartition("/")[2]
            by_hand = (
                f"fetch {url} where you can, then FCVM_KERNEL_URL=file:///PATH FCVM_KERNEL_SHA256={sha256} fcvm setup"
            )
            download.fetch(url, file, step=step, sha256=sha256, by_hand=by_hand)
            kernel = publish(file, work, layout, step)
            workspace.write(pointer, index.to_json(kernel), work)
    return kernel


def publish(file: Path, work: Path, layout: Layout, step: Step) -> Kata:
    """Take the kernel out of the archive ``file`` and put it under ``kernels/``."""
    step.note("unpacking")
    directory = work / "kernel"
    directory.mkdir()
    version = unpack(file, directory / "vmlinux")
    kernel = Kata(keys.of_file(directory / "vmlinux"), version)
    workspace.publish(directory, layout.kernels / kernel.id)
    return kernel


def unpack(file: Path, destination: Path) -> str:
    """Write the kernel in a Kata release archive to ``destination`` and return its version.

    Raises:
        SetupError: the archive is damaged or holds no kernel.
    """
    found: dict[str, bytes] = {}
    chosen = ""
    try:
        with decompressed(file) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                directory, name = posixpath.split(posixpath.normpath(member.name))
                if directory != KATA_DIRECTORY:
                    continue
                if name == "vmlinux.container" and member.issym():
                    chosen = posixpath.basename(member.linkname)
                elif re.fullmatch(r"vmlinux-[0-9][0-9.]*(-[0-9]+)?", name) and member.isfile():
                    content = tar.extractfile(member)
                    assert content is not None
                    found[name] = content.read()
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError) as error:
        raise SetupError(f"The kernel archive {file.name} is damaged: {error}.") from error
    if chosen not in found:
        chosen = max(found, key=version_numbers, default="")
    if not chosen:
        raise SetupError(f"The kernel archive {file.name} holds no {KATA_DIRECTORY}/vmlinux-VERSION.")
    destination.write_bytes(found[chosen])
    return chosen.removeprefix("vmlinux-")


def version_numbers(name: str) -> list[int]:
    """What to sort kernel names by: ``vmlinux-6.18.5-177`` is newer than ``vmlinux-6.9.1-200``."""
    return [int(word) for word in re.findall(r"[0-9]+", name)]


@contextmanager
def decompressed(file: Path) -> Iterator[IO[bytes]]:
    """The content of ``file`` as a stream, decompressed by what its name ends in (.zst, .xz, .gz, .tgz)."""
    if file.suffix != ".zst":
        opener: Any = {".xz": lzma.open, ".gz": gzip.open, ".tgz": gzip.open}.get(file.suffix, open)
        with opener(file, "rb") as stream:
            yield stream
        return
    command = ["zstd", "-dcq", str(file)]
    process = spawn(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        try:
            yield process.stdout
        except tarfile.TarError as error:
            process.wait()  # what zstd says is the cause
            raise SetupError(str(failure(command, process.returncode, process.stderr.read()))) from error
        finally:
            process.kill()
            process.wait()
