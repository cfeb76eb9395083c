"""Builds the guest image and takes its kernel along: one run of mmdebstrap on the host's own Debian mirror.

As root or, with subordinate ids, as an ordinary user. What comes out is named by its content (a snapshot must find
exactly the image that it was made with), and ``guest/<key>.json`` says which one belongs to the recipe's key:

    guest/<key>.json                                     index.Image
    guest/<id>/root.img                                  erofs, uncompressed: shared pages, no time lost unpacking
    guest/<id>/tools/                                    programs for the host; ``assets.tool`` says how to run them
    guest/<id>/packages                                  what is in it: names and versions
    kernels/<id>/vmlinuz, vmlinux, config, modules/VERSION/
"""

import os
import subprocess
from pathlib import Path

from fcvm import log
from fcvm.config import Config
from fcvm.errors import SetupError
from fcvm.process import failure, find, run, spawn
from fcvm.setup import bzimage, index, keys, recipe, sources, workspace
from fcvm.setup.assets import tool
from fcvm.setup.index import Image, architecture
from fcvm.setup.progress import Progress, Step
from fcvm.storage.layout import Layout

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SPACE = 2 << 30  # bytes that a build takes at its peak, roughly
NETWORK_WORDS = ("Could not resolve", "Could not connect", "Failed to fetch", "does not have a Release file")


def build(config: Config, layout: Layout, progress: Progress, *, force: bool = False) -> Image:
    """The image for these settings, built unless it is there; ``force`` builds it again with today's packages.

    Raises:
        SetupError: packages cannot be fetched or installed; the message has mmdebstrap's own last error.
        HostError: mmdebstrap is not installed, or there is too little space.
    """
    pointer = index.image_pointer(config, layout.base)
    name = f"guest-{pointer.stem}"
    with progress.step("Guest image and kernel") as step, workspace.building(layout, name, step) as work:
        image = None if force else index.image(config, layout.base)
        if image is None:
            workspace.require_space(layout.base, SPACE)
            debootstrap(config, work, step)
            image = assemble(config, layout, work, step)
            workspace.write(pointer, index.to_json(image), work)
    return image


def debootstrap(config: Config, work: Path, step: Step) -> None:
    """Run mmdebstrap: leaves ``root.tar`` and ``recipe.OUTPUTS`` in ``work``."""
    record = work / "mmdebstrap.log"
    chroot = work / "chroot"
    chroot.mkdir()
    command = mmdebstrap(config, work)
    step.note("starting mmdebstrap")
    process = spawn(command, stderr=subprocess.PIPE, env={"TMPDIR": str(chroot)})
    assert process.stderr is not None
    try:
        with process.stderr, record.open("wb") as copy:
            for line in process.stderr:
                copy.write(line)
                text = line.decode(errors="replace").rstrip()
                log.debug(text)
                if text.startswith("I: "):
                    step.note("adding the kernel" if " hook" in text or "-hook" in text else text[3:].rstrip("."))
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if code != 0:
        raise explain(command, code, record.read_bytes(), config)


def mmdebstrap(config: Config, work: Path) -> list[str]:
    """The command line of mmdebstrap."""
    options = [
        "--variant=minbase",
        f"--include={','.join(recipe.PACKAGES)}",
        '--aptopt=APT::Install-Recommends "false"',
        '--aptopt=Acquire::Languages "none"',
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in recipe.EXCLUDED),
        f"--customize-hook={recipe.script(architecture())}",
        *(f"--customize-hook=download /tmp/fcvm/{name} {work / name}" for name in recipe.OUTPUTS),
        '--customize-hook=rm -r "$1/tmp/fcvm"',
        "--format=tar",
        "--mode=root",
    ]
    if KEYRING.exists():
        options.append(f"--keyring={KEYRING}")
    return [
        *workspace.namespaces(),
        find("mmdebstrap"),
        *options,
        config.debian_suite,
        str(work / "root.tar"),
        *archive(config),
    ]


def archive(config: Config) -> list[str]:
    """The ``deb`` lines to use: the setting's mirror, or the host's own; none leaves the choice to mmdebstrap."""
    found = sources.mirrors(sources.read())
    if config.debian_mirror:
        found = sources.Mirrors(config.debian_mirror, found.security if found else None)
    return sources.lines(found, config.debian_suite) if found else []


def explain(command: list[str], code: int, output: bytes, config: Config) -> SetupError:
    """The error for a failed mmdebstrap."""
    lines = output.decode(errors="replace").splitlines()
    errors = [line.removeprefix("E: ").strip() for line in lines if line.startswith("E: ")] or lines[-1:]
    first = errors[0] if errors else str(failure(command, code, output))
    unreachable = any(line.startswith("Err:") for line in lines)  # apt's mark of what it could not fetch
    if unreachable or any(word in line for line in errors for word in NETWORK_WORDS):
        where = config.debian_mirror or "the Debian mirror of this host's apt"
        return SetupError(
            f"The guest image's packages ({config.debian_suite}) cannot be fetched from {where}: {first}",
            hint="set FCVM_DEBIAN_MIRROR to a mirror that this host reaches, or copy the data directory of a host where "
            "`fcvm setup` has run and give it with `fcvm setup --from DIRECTORY`",
        )
    return SetupError(
        f"The guest image cannot be built; mmdebstrap failed: {first}",
        hint="FCVM_LOG=debug fcvm setup shows all that mmdebstrap says",
    )


def assemble(config: Config, layout: Layout, work: Path, step: Step) -> Image:
    """Turn mmdebstrap's output into the image and the kernel, and publish both."""
    step.note("packing the root file system")
    image, kernel = work / "image", work / "kernel"
    image.mkdir()
    kernel.mkdir()
    unpack(work / "tools.tar", image / "tools")
    os.replace(work / "packages", image / "packages")
    # The image's own mkfs.erofs: older ones cannot read a tar archive, which is how ownership survives without root.
    root = image / "root.img"
    run([*tool(image / "tools", "mkfs.erofs"), "--quiet", "--tar=f", root, work / "root.tar"])
    (work / "root.tar").unlink()
    step.note("unpacking the kernel")
    unpack(work / "modules.tar", kernel / "modules")
    (version,) = os.listdir(kernel / "modules")
    os.replace(work / "config", kernel / "config")
    os.replace(work / "vmlinuz", kernel / "vmlinuz")
    vmlinuz = (kernel / "vmlinuz").read_bytes()
    (kernel / "vmlinux").write_bytes(bzimage.extract(vmlinuz) if architecture() == "amd64" else vmlinuz)
    step.update(root.stat().st_size, root.stat().st_size)
    names = Image(
        id=keys.of_file(root),
        kernel=keys.of([keys.of_file(kernel / "vmlinuz"), keys.of_file(kernel / "modules" / version / "modules.dep")]),
        kernel_version=version,
        busybox=keys.of_file(image / "tools/busybox"),
        suite=config.debian_suite,
    )
    workspace.publish(kernel, layout.kernels / names.kernel)
    workspace.publish(image, layout.guest / names.id)
    return names


def unpack(archive: Path, destination: Path) -> None:
    """Unpack a tar archive of ours and remove it."""
    destination.mkdir()
    run(["tar", "--no-same-owner", "-C", destination, "-xf", archive])
    archive.unlink()
