"""All settings, in one table: it makes the TOML file, the ``FCVM_*`` variables, and the documentation.

A value is looked for in this order: what the command line says (``overrides``), the environment (``FCVM_BASE_DIR``; an
empty variable counts as not set), the user's file (``~/.config/fcvm/config.toml``), the system's
(``/etc/fcvm/config.toml``), the default below. ``FCVM_CONFIG`` names a file that replaces both files. ``fcvm setup --generate-config`` prints ``generate()``.
"""

from __future__ import annotations

import os

from fc_agent.structs import Struct
from fcvm import log
from fcvm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

UNITS = {"": 1.0, "k": 1 / 1024, "m": 1.0, "g": 1024.0, "t": 1024.0 * 1024}  # MiB
DIGITS = 15  # at most, of a number


class Setting(Struct):
    """One setting: its ``name`` is the TOML key, ``FCVM_<NAME>`` the variable, and ``help`` its documentation."""

    name: str
    parse: Callable[[str], Any]
    default: Any
    help: str


def size(text: str) -> int:
    """A size in MiB from ``"512"`` (MiB), ``"512m"``, ``"2g"``, ``"1.5GiB"``.

    Raises:
        ValueError: it is not a positive size of at least 1 MiB.
    """
    word = text.strip().lower()
    number = word.rstrip("kmgtib")
    unit, bytes_ = word[len(number) : len(number) + 1], word[len(number) + 1 :]
    whole, point, rest = number.rstrip().partition(".")
    if not _is_digits(whole) or (point and not (rest.isascii() and rest.isdigit())) or unit not in UNITS or bytes_ not in ("", "b", "ib"):
        raise ValueError(f"{text!r} is not a size like 512m or 2g")
    mib = int(float(number) * UNITS[unit])
    if mib < 1:
        raise ValueError(f"{text!r} is less than 1m")
    return mib


def count(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from ``least`` on."""

    def parse(text: str) -> int:
        if not _is_digits(text.strip().removeprefix("-")) or int(text) < least:
            raise ValueError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return parse


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= DIGITS


def one_of(*words: str) -> Callable[[str], str]:
    """A parser that takes one of ``words``."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is none of {', '.join(words)}")
        return text

    return parse


def directory(text: str) -> str:
    """An absolute path: ``~`` is the home directory, and what is relative starts from the current directory."""
    path = os.path.expanduser(text)
    if not path or path.startswith("~"):
        raise ValueError(f"{text!r} names no directory")
    return os.path.abspath(path)


def boolean(text: str) -> bool:
    """``true/yes/on/1`` or ``false/no/off/0``."""
    word = text.strip().lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0", ""):
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def default_base_dir() -> str:
    """``/mnt/fcvm-btrfs`` for root, ``~/.local/share/fcvm`` for everyone else (XDG_DATA_HOME respected)."""
    if os.geteuid() == 0:
        return "/mnt/fcvm-btrfs"
    return os.path.join(os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share"), "fcvm")


def default_runtime_dir() -> str:
    """Where sockets live: ``/run/fcvm`` for root, ``$XDG_RUNTIME_DIR/fcvm`` or ``/tmp/fcvm-UID`` otherwise."""
    if os.geteuid() == 0:
        return "/run/fcvm"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(runtime, "fcvm") if runtime else f"/tmp/fcvm-{os.getuid()}"


SETTINGS: tuple[Setting, ...] = (
    Setting("base_dir", directory, default_base_dir, "Data directory: kernels, images, VMs, snapshots."),
    Setting("storage_size", size, "32g", "Size of the loopback btrfs that setup makes at base_dir when run as root."),
    Setting("log", one_of(*log.LEVELS), "warning", "What fcvm says about itself on stderr: debug, info, warning or error."),
    Setting("firecracker", str, "", "Firecracker binary to use; empty: PATH, then the pinned official release."),
    Setting("nv2", boolean, "no", "arm64: VMs that can run VMs; Firecracker, a fork that knows it, gets --enable-nv2."),
    Setting("kernel_profile", one_of("debian", "kata"), "debian", "Guest kernel: debian (the cloud kernel) or kata (a release archive)."),
    Setting("kernel_url", str, "", "Where the kata kernel's release archive is fetched; empty: its official address."),
    Setting("kernel_sha256", str, "", "Checksum of the archive at kernel_url."),
    Setting("debian_suite", str, "trixie", "Debian release of the guest image and its kernel."),
    Setting("debian_mirror", str, "", "Debian mirror; empty: the one that this host's apt uses, or Debian's own."),
    Setting("further_images", lambda text: text and directory(text), "",
            "Another data directory, whose images are used where this one has none of that name."),
    Setting("cpu", count(1), 2, "Virtual CPUs of a VM, unless --cpu says otherwise."),
    Setting("mem", size, "1g", "Memory of a VM, unless --mem says otherwise."),
    Setting("scratch_size", size, "10g", "Size of a VM's writable disk (sparse: it takes what is written)."),
    Setting("stop_timeout", count(0), 10, "Seconds between a container's stop signal and its kill."),
    Setting("log_size", size, "64m", "Container output kept per VM for `fcvm logs`; older output is dropped."),
    Setting("machine_cpus", count(1), lambda: os.cpu_count() or 1, "CPUs of the machine (hosts without KVM)."),
    Setting("machine_mem", size, "8g", "Memory of the machine; it takes from the host what it uses."),
    Setting("machine_disk", size, "64g", "Disk of the machine (sparse)."),
    Setting("machine", one_of("auto", "always", "never"), "auto", "Run VMs in the machine: auto (when there is no usable KVM), always or never."),
)


class Config(Struct):
    """The settings in force, as attributes (``config.base_dir``); made by ``load``."""

    base_dir: str
    storage_size: int
    log: str
    firecracker: str
    nv2: bool
    kernel_profile: str
    kernel_url: str
    kernel_sha256: str
    debian_suite: str
    debian_mirror: str
    further_images: str
    cpu: int
    mem: int
    scratch_size: int
    stop_timeout: int
    log_size: int
    machine_cpus: int
    machine_mem: int
    machine_disk: int
    machine: str


def files(env: Mapping[str, str] = os.environ) -> list[str]:
    """The configuration files that are read, the strongest first; a missing one is skipped."""
    if env.get("FCVM_CONFIG"):
        return [env["FCVM_CONFIG"]]
    home = env.get("XDG_CONFIG_HOME") or os.path.join(env.get("HOME", "/"), ".config")
    return [os.path.join(home, "fcvm/config.toml"), "/etc/fcvm/config.toml"]


def load(overrides: Mapping[str, Any] | None = None, env: Mapping[str, str] = os.environ) -> Config:
    """The settings in force.

    Arguments:
        overrides: values from the command line by setting name, as text or already parsed; None means not given.

    Raises:
        UsageError: a file is not TOML, or holds an unknown setting, or a value is wrong; it says where.
    """
    sources: list[tuple[str, Mapping[str, Any]]] = [
        ("the command line", {k: v for k, v in (overrides or {}).items() if v is not None}),
        ("the environment", {s.name: text for s in SETTINGS if (text := env.get("FCVM_" + s.name.upper()))}),
    ]
    sources += [(path, _read(path)) for path in files(env) if os.path.exists(path)]
    values = {}
    for setting in SETTINGS:
        where, value = next(
            ((w, values_[setting.name]) for w, values_ in sources if setting.name in values_),
            ("the defaults", setting.default() if callable(setting.default) else setting.default),
        )
        try:
            if isinstance(value, list | dict):  # of a TOML file
                raise ValueError(f"{value!r} is not one value")
            values[setting.name] = setting.parse(str(value))
        except ValueError as error:
            raise UsageError(
                f"The setting {setting.name} of {where} is wrong: {error}.",
                hint="fcvm setup --generate-config shows every setting",
            ) from error
    return Config(**values)


def _read(path: str) -> dict[str, Any]:
    import tomllib  # only when there is a file: 5 ms of every start otherwise

    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"The configuration file {path} cannot be read: {error}.") from error
    unknown = sorted(set(values) - {s.name for s in SETTINGS})
    if unknown:
        raise UsageError(
            f"The configuration file {path} has unknown settings: {', '.join(unknown)}.",
            hint="fcvm setup --generate-config shows every setting",
        )
    return values


def generate() -> str:
    """A TOML file with every setting, its documentation and default, commented out."""
    lines = ["# fcvm's settings. Each can also be given as a variable: base_dir is FCVM_BASE_DIR."]
    for setting in SETTINGS:
        default = setting.default() if callable(setting.default) else setting.default
        literal = str(default) if isinstance(default, int) else f'"{default}"'
        lines += ["", f"# {setting.help}", f"# {setting.name} = {literal}"]
    return "\n".join(lines) + "\n"
