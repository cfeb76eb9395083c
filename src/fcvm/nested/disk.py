"""The disk that a VM which runs VMs gets besides its own: fcvm itself, Firecracker, kernel and initrd, ready for use.

It is made once for all that goes into it, ``nested/<key>.img``, erofs, read-only, some 60 MB. In the guest it is mounted on
``PLACE``, and laid out like a data directory, so that the guest's own data directory ``BASE``, on its scratch disk, has
links to it (``fc_agent/nested.py``). The two large things are not on it, as the guest has them as disks already: its own root
image, and this very disk, for VMs further in.

    fcvm                                 the command
    code/                                fcvm's packages, compiled for the guest's Python
    assets.json                          where the rest is: FCVM_ASSETS
    kernels/, initrd/, bin/              as in a data directory
    guest/<id>/root.img                  -> /dev/vda
    nested/<key>.img                     -> /dev/vdd, under any key
"""

import os
from contextlib import suppress
from pathlib import Path

from fc_agent.structs import replace
from fcvm.errors import HostError
from fcvm.linux import files
from fcvm.machine.sync import SOURCES, code_files
from fcvm.nested.profile import FURTHER
from fcvm.process import run
from fcvm.setup import assets as setup_assets
from fcvm.setup import bytecode, keys, workspace
from fcvm.setup.assets import Assets
from fcvm.setup.progress import Progress
from fcvm.storage.layout import Layout, linked, locked, remove

RECIPE = 1  # raise it when the same inputs shall give another disk
KEPT = 2  # disks: one for each version of what is on them

# In the guest.
PLACE = Path("/opt/fcvm")
BASE = Path("/scratch/fcvm")
ROOT_DEVICE = "/dev/vda"
OWN_DEVICE = "/dev/vdd"

COMMAND = """\
#!/usr/bin/python3 -ISE
import os, sys
for name, value in {environment!r}.items():
    os.environ.setdefault(name, value)
sys.path.insert(0, {code!r})
from fcvm.cli.main import main
sys.exit(main())
"""


def ensure(layout: Layout, assets: Assets, progress: Progress) -> Path:
    """The disk for ``assets`` and this fcvm, made unless it is there; in such a VM, its own disk.

    Raises:
        ProcessError: mkfs.erofs fails. HostError: there is too little space.
    """
    if os.environ.get(setup_assets.OVERRIDE) == str(PLACE / "assets.json"):
        return next((BASE / "nested").glob("*.img"))
    path = layout.directory("nested") / f"{key(assets)}.img"
    if path.exists():
        return path
    with progress.step("Disk with fcvm for VMs that run VMs") as step, workspace.building(layout, "nested", step) as work:
        if not path.exists():
            tree = work / "tree"
            furnish(tree, assets, path.stem)
            compile_code(tree / "code", assets.tools, work)
            image = work / path.name
            options = ("--quiet", "-T0", "--all-root", "-U", "00000000-0000-0000-0000-000000000000")
            run([*assets.tool("mkfs.erofs"), *options, image, tree])
            step.update(image.stat().st_size, image.stat().st_size)
            workspace.replace(image, path)
            trim(layout)
    return path


def adopt(path: Path, layout: Layout) -> Path:
    """The disk in ``layout`` that is the one at ``path``, of another data directory: copied when it is missing.

    Raises:
        HostError: it cannot be copied.
    """
    ours = layout.directory("nested") / path.name
    if not ours.exists():
        with locked(layout.cache / "locks" / "nested"):
            temporary = ours.with_suffix(".creating")
            remove(temporary)
            try:
                if not ours.exists():
                    files.clone(path, temporary, mode=0o644)
                    os.replace(temporary, ours)
                    trim(layout)
            except OSError as error:
                raise HostError(f"The disk {path} cannot be copied to {ours.parent}: {error.strerror}.") from error
    return ours


def key(assets: Assets) -> str:
    """What the disk is called: the hash of all that is on it."""
    code = [(name, keys.of_file(SOURCES / name)) for name, _, _ in code_files()]
    firecracker = keys.of_file(assets.firecracker)
    named = [str(path.parent.name) for path in (assets.vmlinux, assets.initrd, assets.root_image)]
    return keys.of([RECIPE, COMMAND, code, firecracker, *named])


def inside(assets: Assets) -> Assets:
    """``assets`` as the guest finds them."""
    kernel = BASE / "kernels" / assets.vmlinux.parent.name / "vmlinux"
    initrd = BASE / "initrd" / assets.initrd.parent.name / "initrd.img"
    return replace(
        assets,
        vmlinux=kernel,
        vmlinuz=kernel,
        root_image=BASE / "guest" / assets.root_image.parent.name / "root.img",
        initrd=initrd,
        machine_initrd=initrd,
        tools=Path("/usr/bin"),
        firecracker=BASE / "bin" / keys.of_file(assets.firecracker) / "firecracker",
    )


def furnish(tree: Path, assets: Assets, name: str) -> None:
    """Lay the disk's content out in the directory ``tree``; ``name`` is the disk's own."""
    there = inside(assets)
    for source, place in ((assets.vmlinux, there.vmlinux), (assets.initrd, there.initrd), (assets.firecracker, there.firecracker)):
        target = tree / place.relative_to(BASE)
        target.parent.mkdir(parents=True)
        files.clone(source, target, mode=0o755 if place == there.firecracker else 0o644)
    for link, device in ((there.root_image, ROOT_DEVICE), (BASE / "nested" / f"{name}.img", OWN_DEVICE)):
        target = tree / link.relative_to(BASE)
        target.parent.mkdir(parents=True)
        target.symlink_to(device)
    (tree / "assets.json").write_text(there.to_json())
    environment = {
        "FCVM_BASE_DIR": str(BASE),
        setup_assets.OVERRIDE: str(PLACE / "assets.json"),
        "FCVM_FURTHER_IMAGES": str(FURTHER),
        "FCVM_MACHINE": "never",
    }
    (tree / "fcvm").write_text(COMMAND.format(environment=environment, code=str(PLACE / "code")))
    (tree / "fcvm").chmod(0o755)


def compile_code(directory: Path, tools: Path, work: Path) -> None:
    """Put fcvm's packages into ``directory``, with bytecode for the Python of the image that ``tools`` are of."""
    sources = []
    for name, _, _ in code_files():
        data = (SOURCES / name).read_bytes()
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        if name.endswith(".py"):
            sources.append((name, str(PLACE / "code" / name), data))
    compiled = bytecode.compile_all(sources, tools, work)
    for name, _, data in sources:
        source = directory / name
        cache = source.parent / "__pycache__"
        cache.mkdir(exist_ok=True)
        (cache / f"{source.stem}.{compiled.tag}.pyc").write_bytes(compiled.file(name, data))


def trim(layout: Layout) -> None:
    """Remove the oldest disks, so that ``KEPT`` stay; those that a VM or a snapshot uses stay as well."""
    directory = layout.directory("nested")
    used = linked(layout.vms)
    for manifest in layout.snapshots.glob("*/config.json"):
        with suppress(FileNotFoundError):  # it is being removed
            text = manifest.read_text(errors="replace")
            used |= {str(path) for path in directory.glob("*.img") if path.name in text}
    disks = sorted(directory.glob("*.img"), key=lambda path: path.stat().st_mtime)
    for path in disks[:-KEPT]:
        if str(path) not in used:
            remove(path)
