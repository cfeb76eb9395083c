"""Command lines, read by argparse; its errors are ours, and Podman's ways of writing options are taken as well."""

from __future__ import annotations

import argparse
import os
import sys

from fcvm import __version__
from fcvm.cli.main import COMMANDS, GLOBAL_OPTIONS, load
from fcvm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

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
