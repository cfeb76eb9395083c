"""`fcvm completions`: shell completions, by argcomplete: the shell asks `fcvm` itself, so VM names complete too."""

import argparse

from fcvm.cli.context import Context

WHERE = "here"
SHELLS = ("bash", "zsh", "fish")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        'bash: eval "$(fcvm completions bash)"; zsh: the same in .zshrc; fish: fcvm completions fish | source'
    )
    parser.add_argument("shell", choices=SHELLS, help="bash, zsh or fish")


def run(args: argparse.Namespace, context: Context) -> int:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["fcvm"], shell=args.shell))
    return 0


def complete() -> None:
    """Answer the shell that asks (``_ARGCOMPLETE`` is set) and exit."""
    import argcomplete

    from fcvm.cli.main import build

    argcomplete.autocomplete(build(all_commands=True))


def vm_names(**_: object) -> list[str]:
    """The names of VMs, for argcomplete; without KVM only if the machine answers at once, so none is started for it."""
    from fcvm import config
    from fcvm.storage.layout import Layout
    from fcvm.vm import state

    return [record.name for record in state.records(Layout(config.load().base_dir))]
