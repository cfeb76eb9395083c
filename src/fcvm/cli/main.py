"""The ``fcvm`` command: finds the command's module, parses, prepares, and runs it here or in the machine.

A command module is imported only when it is the one asked for, and only its parser is made, so ``fcvm --help`` costs argparse
and this file, and a command no more than it needs (docs/architecture.md, "What a start costs").
Every module has ``configure(parser)``, ``run(args, context)``, ``WHERE`` and perhaps more;
docs/architecture.md, "Commands: prepare, then run", says what each does.
"""

from __future__ import annotations

import os
import sys

from fcvm.errors import FcvmError, of_system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any, NoReturn

# name -> (module under fcvm.cli, what it does, in one line)
COMMANDS: dict[str, tuple[str, str]] = {
    "podman": ("podman", "run a container in a microVM (podman run)"),
    "exec": ("exec", "run a command in a VM's container, or in its guest OS"),
    "ls": ("ls", "list VMs"),
    "logs": ("logs", "print what a VM's container has written"),
    "stop": ("stop", "stop VMs"),
    "rm": ("rm", "remove stopped VMs that were kept by --no-rm"),
    "snapshot": ("snapshot", "take snapshots of running VMs, and run clones of them"),
    "snapshots": ("snapshots", "list, remove, export and import snapshots"),
    "images": ("images", "list, load, pull and remove images"),
    "setup": ("setup", "install kernel, guest image, initrd, Firecracker and storage"),
    "doctor": ("doctor", "tell what this host can do and what is missing"),
    "machine": ("machine", "manage the emulated host that is used where there is no KVM"),
    "completions": ("completions", "print shell completions"),
}

WAITING = ("atexit", "threading")  # modules by which something may have asked to be called at the end, or waited for

# These may stand anywhere before the command's own words; they override settings of the same name.
GLOBAL_OPTIONS = {"--base-dir": "data directory (FCVM_BASE_DIR)", "--log": "debug, info, warning or error (FCVM_LOG)"}


def load(module: str) -> ModuleType:
    """The command module ``fcvm.cli.<module>``."""
    __import__(name := f"fcvm.cli.{module}")
    return sys.modules[name]


def requested(argv: list[str]) -> str | None:
    """The command's name in ``argv``: the first word that is not a global option or its value; None for a look at all."""
    words = iter(argv)
    for word in words:
        if word in GLOBAL_OPTIONS:
            next(words, None)
        elif word in ("-h", "--help"):
            return None
        elif not word.startswith("-"):
            return word
    return None


def entry() -> NoReturn:
    """The ``fcvm`` command: run it and exit, without the interpreter's own end, 3 ms, where nobody waits for that."""
    code = main()
    if sys.modules.keys().isdisjoint(WAITING):
        os._exit(code)
    import gc

    gc.freeze()  # a last search for garbage among all that was imported would take 4 ms
    sys.exit(code)


def main(argv: list[str] | None = None) -> int:
    """Run ``fcvm ARGV``; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    open_missing_streams()
    if "_ARGCOMPLETE" in os.environ:
        load("completions").complete()
    return guarded(lambda: dispatch(argv))


def open_missing_streams() -> None:
    """Have /dev/null in the place of a standard stream that was closed (`fcvm ... <&-`); else the next file would get its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def guarded(command: Callable[[], int]) -> int:
    """Run a command and turn whatever it raises into a message and an exit code; 125 is never the container's doing."""
    try:
        return command()
    except FcvmError as error:
        report(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our stdout went away, as in `fcvm ls | head -1`
        return 141
    except OSError as error:
        if os.environ.get("FCVM_LOG") == "debug":
            raise
        report(of_system(error, hint="FCVM_LOG=debug shows where this came from"))
        return FcvmError.exit_code
    except Exception:
        import traceback

        traceback.print_exc()
        report(FcvmError("This is a bug in fcvm."))
        return FcvmError.exit_code
    finally:
        flush()


def dispatch(argv: list[str]) -> int:
    """Parse ``argv`` and carry it out, here or in the machine."""
    args = plain(argv)
    if args is None:
        from fcvm.cli.parser import build

        parser = build(requested(argv))
        args = parser.parse_args(argv)
    if args.fcvm_command is None:
        parser.print_help()
        return 0

    module = load(COMMANDS[args.fcvm_command][0])
    if module.WHERE == "anywhere":
        return int(module.run(args))

    from fcvm import config as settings
    from fcvm import log
    from fcvm.cli.context import Context

    overrides = {"base_dir": args.base_dir, "log": args.log}
    context = Context(settings.load(overrides))
    log.configure(context.config.log)
    if hasattr(module, "prepare"):
        module.prepare(args, context)
    if module.WHERE == "vms" and not (hasattr(module, "is_here") and module.is_here(args, context)):
        from fcvm import host

        if host.uses_machine(context.config):
            from fcvm.cli.remote import forward

            return forward(args, context)
    return int(module.run(args, context))


def plain(argv: list[str]) -> Any:
    """The arguments of a command that can read ``argv`` without argparse; None for all others."""
    if not argv or argv[0] not in COMMANDS:
        return None
    module = load(COMMANDS[argv[0]][0])
    return module.plain(argv) if hasattr(module, "plain") else None


def report(error: FcvmError) -> None:
    """Print an error for a person: what happened, then the next step; colour only on a terminal."""
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    red, bold, plain = ("\033[31m", "\033[1m", "\033[0m") if colour else ("", "", "")
    print(f"{red}error:{plain} {error.message}", file=sys.stderr)
    if error.hint:
        print(f"{bold}hint:{plain} {error.hint}", file=sys.stderr)


def flush() -> None:
    """Flush our output now, while a reader that has gone can still be ignored quietly."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    entry()
