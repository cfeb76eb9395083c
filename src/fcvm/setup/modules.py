"""Which kernel modules an initrd needs, in the order in which they must be loaded.

``modules.dep`` (depmod's) lists every module with all that it needs, the nearest first; ``modules.builtin`` those that
are part of the kernel already.
"""

import lzma
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from fc_agent.structs import Struct
from fcvm.errors import SetupError
from fcvm.process import run


class Index(Struct):
    """The modules of one kernel: paths relative to its directory, by name."""

    paths: dict[str, str]
    needs: dict[str, tuple[str, ...]]
    builtin: frozenset[str]


def name_of(path: str) -> str:
    """A module's name from its file name; the kernel takes ``-`` and ``_`` for the same."""
    return PurePosixPath(path).name.partition(".ko")[0].replace("-", "_")


def read(directory: Path) -> Index:
    """The index of ``/usr/lib/modules/VERSION``."""
    paths: dict[str, str] = {}
    needs: dict[str, tuple[str, ...]] = {}
    for line in (directory / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        paths[name_of(path)] = path
        needs[name_of(path)] = tuple(name_of(word) for word in rest.split())
    builtin = frozenset(name_of(line) for line in (directory / "modules.builtin").read_text().splitlines())
    return Index(paths, needs, builtin)


def order(index: Index, wanted: Iterable[str]) -> list[str]:
    """The names of ``wanted`` and of all they need, each once and after what it needs; built-in ones left out.

    Raises:
        SetupError: the kernel has no such module.
    """
    result: list[str] = []
    for name in (word.replace("-", "_") for word in wanted):
        if name in index.builtin:
            continue
        if name not in index.paths:
            raise SetupError(f"The kernel has no module {name}, which the guest needs.")
        for module in (*reversed(index.needs[name]), name):
            if module not in result:
                result.append(module)
    return result


def load(path: Path) -> bytes:
    """A module's content, decompressed: busybox's insmod takes only that."""
    data = path.read_bytes()
    match path.suffix:
        case ".xz":
            return lzma.decompress(data)
        case ".zst":
            return run(["zstd", "-dcq"], input=data).stdout
        case ".gz":
            import gzip

            return gzip.decompress(data)
        case _:
            return data
