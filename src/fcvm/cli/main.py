"""The ``fcvm`` command: finds the command's module, parses, prepares, and runs it here or in the machine.

A command module is imported only when it is the one asked for, and only its parser is made, so ``fcvm --help`` costs argparse
and this file, and a command no more than it needs (docs/architecture.md, "What a start costs").
Every module has ``configure(parser)``, ``run(args, context)``, ``WHERE`` and perhaps ``prepare(args, context)``;
docs/architecture.md, "Commands: prepare, then run", says what each does.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from fcvm import __version__
from fcvm.errors import FcvmError, UsageError, of_system

TYPE_CHECKING = False
if TYPE_CHECKING:
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

# These may stand anywhere before the command's own words; they override settings of the same name.
GLOBAL_OPTIONS = {"--base-dir": "data directory (FCVM_BASE_DIR)", "--log": "debug, info, warning or error (FCVM_LOG)"}

TRUE, FALSE = ("1", "t", "true"), ("0", "f", "false")  # as Podman reads them, in any case

vars(argparse)["_"] = lambda text: text  # there are no translations of us, and to look for those of argparse would import locale


class Formatter(argparse.HelpFormatter):
    """argparse's, told the terminal's width: every argument makes one, and each would import shutil to ask."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, width=columns() - 2, **options)


def columns() -> int:
    """The width of the terminal that is our stdout: what COLUMNS says, or the kernel; 80 for anything else."""
    try:
        return int(os.environ.get("COLUMNS", "0")) or os.get_terminal_size(1).columns or 80
    except (OSError, ValueError):
        return 80


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are ours: one sentence, a hint, exit code 125 as Podman's."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=Formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message[:1].upper() + message[1:] + ".", hint=f"{self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but unknown words are an error of the command that they were given to, whose help is the hint."""
        known, unknown = super().parse_known_args(self._plain(sys.argv[1:] if args is None else args), namespace)
        if unknown:
            self.error(f"there is no option {unknown[0]}" if unknown[0].startswith("-") else f"unexpected: {unknown[0]!r}")
        return known, unknown

    def _plain(self, args: Sequence[str]) -> list[str]:
        """What Podman takes as well, as argparse wants it: flags with a value (`--rm=false`), values with a dash (`--cmd -v`).

        Short options in one word (`-itv a:b`) are taken apart for that: behind flags one may take the rest, or the next word.
        Only up to the first word that is no option: behind it a container's command may stand.
        """
        words, plain = list(args), list[str]()
        while words and words[0].startswith("-") and words[0] not in ("-", "--"):
            word = words.pop(0)
            short = self._option_string_actions.get(word[:2])
            if short is not None and word[2:] and word[2] != "=":
                words[:0] = [word[:2], f"-{word[2:]}" if short.nargs == 0 else word[2:]]
                continue
            option, given, value = word.partition("=")
            action = self._option_string_actions.get(option)
            if given and isinstance(action, argparse._StoreTrueAction | argparse.BooleanOptionalAction):
                if value.lower() not in TRUE + FALSE:
                    self.error(f"{option} is true or false, not {value!r}")
                on = (value.lower() in TRUE) != option.startswith("--no-")
                plain = [earlier for earlier in plain if earlier not in action.option_strings]  # the last one counts
                plain += [name for name in action.option_strings if name[:2] == "--" and on != name.startswith("--no-")][:1]
            elif action is not None and action.nargs is None and not given and words:
                value = words.pop(0)
                plain += [f"{option}={value}"] if value.startswith("-") and value != "--" else [word, value]
            else:
                plain.append(word)
        return plain + words


def build(command: str | None = None, *, all_commands: bool = False) -> Parser:
    """The parser of ``command``; of all commands if that is none: by name only, unless ``all_commands`` are to be filled in."""
    parser = Parser(prog="fcvm", description="Run OCI containers in Firecracker microVMs, and clone running VMs.")
    parser.add_argument("--version", action="version", version=f"fcvm {__version__}")
    for option, text in GLOBAL_OPTIONS.items():
        parser.add_argument(option, help=text)
    commands = parser.add_subparsers(dest="fcvm_command", metavar="COMMAND", parser_class=Parser, title="commands")
    for name in [command] if command in COMMANDS else COMMANDS:
        module, summary = COMMANDS[name]
        child = commands.add_parser(name, help=summary, description=summary[:1].upper() + summary[1:] + ".")
        if name == command or all_commands:
            load(module).configure(child)
    return parser


def load(module: str) -> ModuleType:
    """The command module ``fcvm.cli.<module>``."""
    return importlib.import_module(f"fcvm.cli.{module}")


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


def main(argv: list[str] | None = None) -> int:
    """Run ``fcvm ARGV``; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    open_missing_streams()
    if "_ARGCOMPLETE" in os.environ:
        load("completions").complete()
    try:
        return guarded(lambda: dispatch(argv))
    finally:
        gc.freeze()  # we end: a last search for garbage among all that was imported would take 4 ms


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
    name = requested(argv)
    parser = build(name)
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
    if module.WHERE == "vms":
        from fcvm import host

        if host.uses_machine(context.config):
            from fcvm.cli.remote import forward

            return forward(args, context)
    return int(module.run(args, context))


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
    sys.exit(main())
