"""`fcvm completions`: shell completions, by argcomplete: the shell asks `fcvm` itself, so VM names complete too."""

import argparse
import os

from fcvm.errors import FcvmError

WHERE = "anywhere"
SHELLS = ("bash", "zsh", "fish")
MACHINE_TIMEOUT = 5.0  # seconds that a shell may wait for names


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        'bash: eval "$(fcvm completions bash)"; zsh: the same in .zshrc; fish: fcvm completions fish | source'
    )
    parser.add_argument("shell", choices=SHELLS, help="bash, zsh or fish")


def run(args: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["fcvm"], shell=args.shell))
    return 0


def complete() -> None:
    """Answer the shell that asks (``_ARGCOMPLETE`` is set) and exit."""
    import argcomplete

    from fcvm.cli.parser import build

    argcomplete.autocomplete(build(all_commands=True))


def vm_names(**_: object) -> list[str]:
    """The names of VMs, for argcomplete. Without KVM the machine is asked if it runs; none is started for it."""
    from fcvm import config, host
    from fcvm.storage.layout import Layout
    from fcvm.vm import state

    settings = config.load()
    layout = Layout(settings.base_dir)
    if not host.uses_machine(settings):
        return [record.name for record in state.records(layout)]
    from fcvm.machine.machine import Machine

    if Machine(settings, layout).status().phase != "running":
        return []
    import json
    import sys

    from fcvm import process

    env = {name: text for name, text in os.environ.items() if name.startswith("FCVM_")}
    command = [sys.executable, "-m", "fcvm", "ls", "--all", "--json"]
    try:
        listed = process.run(command, env=env, timeout=MACHINE_TIMEOUT).stdout
    except FcvmError:  # nobody completes a word to read of errors
        return []
    return [vm["name"] for vm in json.loads(listed)]


def first_is_vm(*, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """As ``vm_names``, for arguments of which only the first is a VM's name, as in `exec NAME COMMAND`."""
    return [] if getattr(parsed_args, "words", None) else vm_names()
