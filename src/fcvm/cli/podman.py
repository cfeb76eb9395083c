"""`fcvm podman run`: a container in a microVM of its own."""

from __future__ import annotations

import argparse
import os
import sys

from fcvm.cli import values
from fcvm.cli.context import Context
from fcvm.errors import NotFoundError, UsageError
from fcvm.storage.layout import Layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

WHERE = "vms"

ENTRYPOINT_HINT = """--entrypoint '["nginx", "-t"]', or --entrypoint nginx"""
ELF = b"\x7fELF"


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="run", required=True, title="commands")
    run = actions.add_parser(
        "run",
        help="run a container in a new microVM",
        usage="fcvm podman run [OPTIONS] IMAGE [--] [COMMAND ...]",
        description="Run an image's container under Podman in a new Firecracker microVM. The exit code is the container's.",
    )
    add = run.add_argument
    add("--name", metavar="NAME", help="name of the VM, unique among those that live (default: made up)")
    add("--cpu", "--cpus", metavar="N", help="virtual CPUs (default: the setting cpu)")
    add("--mem", "--memory", "-m", metavar="SIZE", help="memory: MiB, or 512m, 2g (default: the setting mem)")
    add(
        "--env",
        "-e",
        action="append",
        default=[],
        metavar="K=V",
        help="environment variable; K=V,K2=V2 lists; K alone: from ours",
    )
    add("--env-file", action="append", default=[], metavar="FILE", help="read variables from a file")
    add("--cmd", metavar="STRING", help="the container's command in one string, split as a shell splits words")
    add("--entrypoint", metavar="STRING", help="replace the image's entrypoint; a string, or a JSON array")
    add("--user", "-u", metavar="USER[:GROUP]", help="user of the container's process")
    add("--workdir", "-w", metavar="DIR", help="working directory in the container")
    add("--privileged", action="store_true", help="give the container all of its VM's devices and capabilities")
    add("--label", "-l", action="append", default=[], metavar="K=V", help="label of the VM and container; K alone: empty")
    add("--rm", action=argparse.BooleanOptionalAction, default=True, help="remove the VM when it has ended (default)")
    add("--detach", "-d", action="store_true", help="run in the background; print the name")
    add("--interactive", "-i", action="store_true", help="pass our stdin on")
    add("--tty", "-t", action="store_true", help="give the container a terminal")
    add(
        "--pull",
        default="missing",
        metavar="POLICY",
        choices=("always", "missing", "newer", "never"),
        help="when to pull: always, missing (default), newer, never",
    )
    add(
        "--publish",
        "-p",
        action="append",
        default=[],
        metavar="[IP:][HOST:]GUEST[/udp]",
        help="publish a port on the host",
    )
    add(
        "--map",
        "--volume",
        "-v",
        action="append",
        default=[],
        metavar="HOST:GUEST[:ro]",
        help="show a host directory or file in the container; more, separated by commas",
    )
    add(
        "--network",
        metavar="MODE",
        choices=("rootless", "bridged", "none"),
        help="rootless, bridged or none (default: bridged as root)",
    )
    add(
        "--forward-localhost",
        action="append",
        default=[],
        metavar="PORTS",
        help="let the guest reach these ports of the host's loopback",
    )
    add("--dns", action="append", default=[], metavar="IP", help="resolver to ask instead of the host's")
    add(
        "--health-check",
        metavar="URL",
        help="healthy when this URL answers in the guest (default: the image's HEALTHCHECK)",
    )
    add("--stop-timeout", metavar="SECONDS", help="from stop signal to kill (default: the setting stop_timeout)")
    add("--kernel", metavar="FILE", help="boot this vmlinux instead of the one from setup")
    add("--inception", action="store_true", help="a VM that can run VMs: it has fcvm and all that takes (docs/nested.md)")
    add("--firecracker-args", metavar="STRING", help="more words for Firecracker's command line")
    add("--scratch-size", metavar="SIZE", help="size of the VM's writable disk (default: the setting scratch_size)")
    add(
        "--log-prefix",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="begin lines with [ctr:out] or [ctr:err] (default: on a terminal)",
    )
    add("--no-snapshot", action="store_true", help="boot a kernel, even if there is a boot snapshot to start from")
    add(
        "--warm",
        action="store_true",
        help="start with the application up: from a snapshot taken when an identical run was healthy, or take it now",
    )
    add("--timings", action="store_true", help="print how long each stage of the start took, on stderr")
    add("--setup", action="store_true", help="run `fcvm setup` first if something is missing")
    add(
        "words",
        nargs=argparse.REMAINDER,
        metavar="IMAGE [--] [COMMAND ...]",
        help="the image, then the container's command and arguments",
    )


def prepare(args: argparse.Namespace, context: Context) -> None:
    """Check everything, resolve the image to its disk, and leave ``args.spec``, plain JSON, for ``run``."""
    from fcvm import host, setup
    from fcvm.vm.spec import ImageUse, RunSpec

    if args.words[:1] == ["--"]:
        args.words.pop(0)
    draft = _check(args, context)
    if not host.uses_machine(context.config):
        host.need_kvm()
    if args.setup:
        from fcvm.setup import progress

        with progress.open() as shown:
            setup.ensure(context.config, context.layout, shown)
    else:
        setup.find(context.config, context.layout)
    if args.inception:
        draft["nested"] = _nested_disk(context, draft)

    from fcvm.images import resolve

    further = Layout(context.config.further_images) if context.config.further_images else None
    image = resolve.ensure(args.words[0], pull=args.pull, layout=context.layout, further=further)
    use = ImageUse(
        reference=image.reference,
        id=image.id,
        digest=image.digest,
        path=str(image.path),
        user=image.config.get("User") or "",
    )
    user = args.user or use.user
    if user and draft["volumes"]:
        from fcvm.images import users

        draft["owner"] = users.numbers(image.path, user)
    args.spec = RunSpec(image=use, **draft).to_json()


def _check(args: argparse.Namespace, context: Context) -> dict[str, Any]:
    """The fields of the RunSpec, all but the image: cheap checks come before any work."""
    from fcvm.nested import profile
    from fcvm.network import spec as network
    from fcvm.vm import spec, state
    from fcvm.volumes import spec as volumes

    config = context.config
    if not args.words:
        raise UsageError("No image is named.", hint="fcvm podman run IMAGE")
    network.parse(args.network, args.publish, args.forward_localhost, args.dns)
    command = args.words[1:]
    if command[:1] == ["--"]:
        command = command[1:]
    if args.cmd is not None and command:
        raise UsageError(
            "The container's command is given twice: by --cmd and after the image.", hint="leave one of them out"
        )
    if args.tty and not sys.stdin.isatty() and args.interactive and not args.detach:
        raise UsageError("--tty needs a terminal on stdin.", hint="use -i alone to pipe data in")
    if args.detach and args.interactive and not args.tty:
        raise UsageError("A detached container has no stdin.", hint="leave out -i or -d")
    if args.detach and args.timings:
        raise UsageError("--timings are of a start that is waited for.", hint="leave out --detach")
    if args.detach and args.log_prefix is not None:
        raise UsageError("A detached container's output is not shown.", hint="leave out --log-prefix; fcvm logs NAME")
    if args.warm and args.interactive:
        raise UsageError(
            "--warm and --interactive do not go together: the next run would have this one's input.",
            hint="leave out -i",
        )
    if args.warm and args.no_snapshot:
        raise UsageError("--warm and --no-snapshot contradict each other.", hint="leave one of them out")
    env: dict[str, str] = {}
    for path in args.env_file:
        env |= values.env_file(path)
    env |= values.pairs(args.env, "--env", environ=os.environ)
    kernel = _kernel(args.kernel) if args.kernel is not None else None
    mapped = volumes.parse_all(args.map)
    default_memory = config.mem * (profile.DEFAULT_MEMORY if args.inception else 1)
    name = state.check_name(args.name) if args.name is not None else f"vm-{state.new_id()[:8]}"
    if args.cmd is not None:
        command = values.words(args.cmd, "--cmd")
    return {
        "name": name,
        "command": command or None,
        "entrypoint": _entrypoint(args.entrypoint),
        "env": env,
        "user": args.user,
        "workdir": args.workdir,
        "privileged": args.privileged,
        "labels": values.labels(args.label, "--label"),
        "cpu": spec.check_cpu(values.number(args.cpu, "--cpu", least=1) if args.cpu is not None else config.cpu),
        "memory": spec.check_memory(values.size(args.mem, "--mem") if args.mem is not None else default_memory),
        "scratch_size": values.size(args.scratch_size, "--scratch-size") if args.scratch_size is not None else config.scratch_size,
        "kernel": kernel,
        "firecracker_args": profile.firecracker_args(
            values.words(args.firecracker_args or "", "--firecracker-args"), config
        ),
        "tty": args.tty,
        "interactive": args.interactive,
        "detach": args.detach,
        "remove": args.rm,
        "stop_timeout": values.number(args.stop_timeout, "--stop-timeout")
        if args.stop_timeout is not None
        else config.stop_timeout,
        "health_check": _url(args.health_check),
        "log_prefix": args.log_prefix,
        "network": args.network,
        "publish": args.publish,
        "forward_localhost": args.forward_localhost,
        "dns": args.dns,
        "volumes": profile.with_images(mapped, context.layout) if args.inception else mapped,
        "snapshot": not args.no_snapshot,
        "warm": args.warm,
        "timings": args.timings,
    }


def _nested_disk(context: Context, draft: dict[str, Any]) -> str:
    """The disk for a VM that runs VMs, made if it is not there yet."""
    from fcvm import setup
    from fcvm.nested import disk, profile
    from fcvm.setup import progress

    assets = setup.find(context.config, context.layout)
    profile.check(context.config, draft["kernel"], assets.kernel_version, draft["firecracker_args"])
    with progress.open() as shown:
        return str(disk.ensure(context.layout, assets, shown))


def _kernel(path: str) -> str:
    """``--kernel`` as an absolute path, if it is one that Firecracker can boot."""
    hint = f"file {path}; --kernel takes an uncompressed ELF kernel (vmlinux)"
    try:
        with open(path, "rb") as file:
            begins = file.read(len(ELF))
    except OSError as error:
        raise NotFoundError(f"The kernel {path} cannot be read: {error.strerror}.", hint=hint) from error
    if begins != ELF and os.uname().machine == "x86_64":  # on arm64 it is the flat Image
        raise UsageError(f"{path} is not an uncompressed kernel.", hint=hint)
    return os.path.abspath(path)


def _entrypoint(text: str | None) -> list[str] | None:
    """``--entrypoint`` as Podman takes it: one program, or a JSON array; the empty string clears the image's."""
    if text is None:
        return None
    if text.startswith("["):
        import json

        try:
            words = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--entrypoint {text!r} is not a JSON array: {error}.", hint=ENTRYPOINT_HINT) from error
        if not all(isinstance(word, str) for word in words):
            raise UsageError(f"--entrypoint {text!r} is not an array of strings.", hint=ENTRYPOINT_HINT)
        return list(words)
    return [text] if text else []


def _url(text: str | None) -> str | None:
    """``--health-check`` if it is a URL that can be asked in the guest."""
    if text is None:
        return None
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(text)
        sound = parts.scheme in ("http", "https") and parts.netloc and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise UsageError(f"--health-check {text!r} is not a URL.", hint="--health-check http://localhost:80/")
    return text


def run(args: argparse.Namespace, context: Context) -> int:
    from fcvm.vm import run as vm
    from fcvm.vm.spec import RunSpec

    spec = RunSpec.from_json(args.spec)
    if spec.nested is not None:
        from fcvm.nested import profile

        profile.require_nesting()
    if spec.detach:
        return vm.detached(spec, context.config)
    return vm.foreground(spec, context.config)
