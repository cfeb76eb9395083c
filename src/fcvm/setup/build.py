"""Provides all that ``assets.find`` looks for: builds and fetches what is missing, or copies it from elsewhere."""

import os
import shutil
from pathlib import Path

from fcvm.config import Config
from fcvm.errors import SetupError
from fcvm.linux import files
from fcvm.setup import assets, bytecode, firecracker, guest, index, initrd, kata, storage, workspace
from fcvm.setup.assets import Assets
from fcvm.setup.index import Image
from fcvm.setup.progress import Progress
from fcvm.storage.layout import Layout

AGENT = "/run/fcvm/fc_agent.pyz"  # where init.sh puts it


def ensure(config: Config, layout: Layout, progress: Progress, *, force: bool = False) -> Assets:
    """Build and fetch whatever is missing, storage first; ``force`` does it anew, with today's packages.

    Running twice at once is fine: the second waits for the first and finds everything there.

    Raises:
        SetupError, HostError, UsageError: see ``guest.build``, ``kata.build``, ``firecracker.build``, ``storage.ensure``.
    """
    storage.ensure(layout.base, config.storage_size, progress)
    if not force:
        try:
            return assets.find(config, layout)
        except SetupError:
            pass
    if force or assets.firecracker_of(config, layout)[1] is None:  # first, as it is the quickest to fail
        firecracker.build(config, layout, progress, force=force)
    base, image = (layout.base, None) if force else assets.image_of(config, layout)
    if image is None:
        image = guest.build(config, layout, progress, force=force)
    ensure_initrd(layout, progress, base, image, image.kernel, base / "kernels" / image.kernel / "modules")
    if config.kernel_profile == "kata":
        kernel = assets.kata_of(config, layout)[1] or kata.build(config, layout, progress)
        ensure_initrd(layout, progress, base, image, kernel.id, None)
    return assets.find(config, layout)


def ensure_initrd(
    layout: Layout, progress: Progress, base: Path, image: Image, kernel: str, modules: Path | None
) -> None:
    """Build the initrd for the kernel ``kernel`` unless it is there.

    Arguments:
        base: the data directory that ``image`` is in.
        modules: the directory with the kernel's modules, by version; None for one that has everything built in.
    """
    if assets.initrd_of(layout, kernel, image) is not None:
        return
    destination = index.initrd(layout.base, kernel, image.busybox)
    from fcvm.agent.pack import pack

    name = f"initrd-{destination.parent.name}"
    with progress.step("Initrd") as step, workspace.building(layout, name, step) as work:
        if destination.exists():
            return
        agent = work / "fc_agent.pyz"
        pack(agent)
        tools = base / "guest" / image.id / "tools"
        bytecode.precompile(agent, AGENT, tools, work)
        built = work / "initrd"
        built.mkdir()
        directory = modules / image.kernel_version if modules is not None else None
        initrd.build(built / "initrd.img", busybox=tools / "busybox", agent=agent, module_directory=directory)
        size = (built / "initrd.img").stat().st_size
        step.update(size, size)
        layout.initrd.mkdir(exist_ok=True)
        workspace.publish(built, destination.parent)


def adopt(config: Config, layout: Layout, source: Path, progress: Progress) -> None:
    """Copy what there is for these settings from another data directory: of another host, on a stick.

    Raises:
        SetupError: it holds nothing for these settings and this version of fcvm.
    """
    image = index.image(config, source)
    if image is None:
        raise SetupError(
            f"{source} holds no guest image for these settings and this version of fcvm.",
            hint="run `fcvm setup` of this version on the host it comes from",
        )
    wanted = [source / "kernels" / image.kernel, source / "guest" / image.id, index.image_pointer(config, source)]
    if config.kernel_profile == "kata" and (kernel := index.kata(config, source)):
        wanted += [source / "kernels" / kernel.id, index.kata_pointer(config, source)]
    binary = index.firecracker(config, source)
    if binary is not None and binary.pinned:
        wanted += [Path(binary.path).parent, source / "bin/firecracker.json"]
    storage.ensure(layout.base, config.storage_size, progress)
    with progress.step(f"Copying from {source}") as step, workspace.building(layout, "adopt", step) as work:
        for path in wanted:  # a pointer comes after what it points to
            name = path.relative_to(source)
            step.note(str(name))
            copy(path, work / "copy", layout.base / name)


def copy(source: Path, temporary: Path, destination: Path) -> None:
    """Copy a directory (unless it is there) or a file (over the one that is there) to its place, in one step."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        if source.is_dir():
            if not destination.exists():
                shutil.copytree(source, temporary, symlinks=True, copy_function=_copy_file)
                workspace.publish(temporary, destination)
        else:
            _copy_file(source, temporary)
            workspace.replace(temporary, destination)
    except (OSError, shutil.Error) as error:
        raise SetupError(f"{source} cannot be copied: {error}.") from error


def _copy_file(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> None:
    files.clone(Path(source), Path(destination))
    shutil.copystat(source, destination)
