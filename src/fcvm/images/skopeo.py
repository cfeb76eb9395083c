"""Runs skopeo, which fetches images from wherever they are, and says in one sentence what went wrong.

skopeo brings what users expect without our doing: credentials from the usual files (``podman login``, ``docker login``,
REGISTRY_AUTH_FILE), mirrors and insecure registries from registries.conf, the signature policy of policy.json.
"""

import os
import re
import select
import subprocess
from collections.abc import Callable
from pathlib import Path

from fcvm import log, process
from fcvm.errors import ImageError
from fcvm.images.reference import Reference

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # uname -m -> OCI
POLICIES = (Path(".config/containers/policy.json"), Path("/etc/containers/policy.json"))
LOOK_EVERY = 0.2  # seconds between looks at how much has been fetched
INSPECT_TIMEOUT = "90s"

UNREACHABLE = (
    r"(?:dial tcp|lookup)[^\n]*?: ([a-z/ ]*(?:refused|no such host|timeout|no route to host|unreachable|misbehaving))"
)
DAMAGED = (
    r"unexpected EOF|invalid tar header|Tar component .* not found|[Dd]igest did not match|does not match|gzip: invalid"
    r"|invalid character|unexpected end of JSON|archive/tar|no such file or directory|flate: corrupt|invalid checksum"
    r"|magic number mismatch|manifest.json not found|unknown blob|file does not exist|unsupported schema version"
)


class Unavailable(ImageError):
    """The registry cannot be reached or does not have the image: another one may."""


def architecture() -> str:
    """This host's architecture, as images call it."""
    machine = os.uname().machine
    return ARCHITECTURES.get(machine, machine)


def inspect(reference: Reference) -> bytes:
    """The manifest, or the list of manifests, that ``reference`` stands for.

    Raises:
        ImageError: it cannot be had (``Unavailable`` if another registry may have it).
        HostError: skopeo is not installed.
    """
    command = [*_command(reference), f"--command-timeout={INSPECT_TIMEOUT}", "inspect", "--raw", reference.source]
    log.debug(f"running {' '.join(command)}")
    done = process.run(command, check=False, env=_environment())
    if done.returncode != 0:
        raise explain(reference, done.stderr.decode(errors="replace"))
    return done.stdout


def copy(
    source: Reference,
    destination: Path,
    fetched: Callable[[int], object],
    note: Callable[[str], object],
    *,
    name: Reference | None = None,
) -> None:
    """Copy the image to the directory ``destination`` (skopeo's ``dir:``), byte for byte as it is at its source.

    Arguments:
        fetched: called now and then with the number of bytes that are there.
        note: called with what skopeo says that it does.
        name: what the user knows it by, for errors.

    Raises:
        ImageError, HostError: as ``inspect``; something may be left at ``destination``.
    """
    scratch = destination.with_name(destination.name + ".tmp")
    scratch.mkdir()
    daemon = os.environ.get("DOCKER_HOST") if source.transport == "docker-daemon" else None
    options = [f"--src-daemon-host={daemon}"] if daemon else []
    command = [*_command(source), f"--tmpdir={scratch}", "copy", *options, source.source, f"dir:{destination}"]
    log.debug(f"running {' '.join(command)}")
    child = process.spawn(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment() | {"TMPDIR": str(scratch)}
    )
    said = bytearray()
    try:
        assert child.stdout is not None
        while True:
            if not select.select([child.stdout], [], [], LOOK_EVERY)[0]:
                fetched(_size(destination))
            elif data := os.read(child.stdout.fileno(), 1 << 16):
                said += data
                note(_short(data.decode(errors="replace")))
            else:
                break
        code = child.wait()
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
    if code != 0:
        raise explain(name or source, said.decode(errors="replace"))
    fetched(_size(destination))


def explain(reference: Reference, output: str) -> ImageError:
    """The error that skopeo's ``output`` (its whole stderr) means, without its noise."""
    fatal = re.findall(r'level=fatal msg="((?:[^"\\]|\\.)*)"', output)
    reason = re.sub(r'\\(["\\])', r"\1", fatal[-1]) if fatal else output.strip().rpartition("\n")[2]
    registry = reference.domain
    if "no space left on device" in reason or "disk quota exceeded" in reason:
        return ImageError(f"There is no space left to store the image {reference}.", hint="fcvm images prune; df -h")
    if matched := re.search(r"no image found in .* for architecture (\w+)", reason):
        return wrong_architecture(str(reference), "other architectures", matched[1])
    if "Source image rejected" in reason:
        return ImageError(f"The signature policy of this host rejects {reference}.", hint="man containers-policy.json")
    if registry:
        return _explain_registry(reference, registry, reason)
    if re.search(r"does not resolve to an image ID|identifier is not an image", reason):
        return ImageError(f"Podman's storage has no image {reference.location}.", hint="podman images")
    if re.search(r"Cannot connect to the Docker daemon|docker.sock", reason):
        return ImageError(f"The Docker daemon cannot be reached to fetch {reference}.", hint="systemctl start docker")
    if re.search(r"No such image|reference does not exist", reason):
        return ImageError(f"The Docker daemon has no image {reference.location}.", hint="docker images")
    if reference.path and "permission denied" in reason:
        return ImageError(f"{reference.path} cannot be read: permission denied.", hint=f"ls -l {reference.path}")
    if reference.path and re.search(
        r'Tag ".*" not found|Invalid source index|more than one image|no descriptor found', reason
    ):
        return ImageError(f"{reference.path} does not hold the one image that {reference} asks for: {_brief(reason)}.",
                          hint=f"{reference.transport}:{reference.path}:NAME names one of several")  # fmt: skip
    if reference.path and re.search(DAMAGED, reason):
        return ImageError(
            f"{reference.path} is damaged, or not an image of the kind {reference.transport}.",
            hint="docker-archive: from `docker save`, `podman save`; oci-archive:, oci: and dir: from `skopeo copy`",
        )
    return ImageError(
        f"The image {reference} cannot be read: {_brief(reason)}.", hint="FCVM_LOG=debug shows the command"
    )


def wrong_architecture(reference: str, theirs: str, ours: str) -> ImageError:
    """The error for an image that this host cannot run."""
    return ImageError(f"The image {reference} is for {theirs}, and this host runs {ours}.",
                      hint=f"name an image that is made for linux/{ours}")  # fmt: skip


def _explain_registry(reference: Reference, registry: str, reason: str) -> ImageError:
    without = "an image in a file needs no registry: fcvm images load FILE --name localhost/NAME"
    if "HTTP response to HTTPS client" in reason:
        return Unavailable(
            f"The registry {registry} speaks plain HTTP, which is not trusted.",
            hint=f'put [[registry]] location="{registry}" insecure=true into /etc/containers/registries.conf',
        )
    if "x509:" in reason or "certificate" in reason:
        detail = _brief(reason[reason.find("x509:") :]) if "x509:" in reason else _brief(reason)
        return Unavailable(
            f"The certificate of the registry {registry} is not trusted: {detail}.",
            hint=f"put its CA at /etc/containers/certs.d/{registry}/ca.crt",
        )
    if matched := re.search(UNREACHABLE, reason):
        return Unavailable(f"The registry {registry} cannot be reached: {matched[1].strip()}.", hint=without)
    if "toomanyrequests" in reason:
        return Unavailable(
            f"The registry {registry} allows no more downloads for now.", hint=f"skopeo login {registry}"
        )
    if re.search(r"unauthorized|authentication required|denied|invalid username/password|forbidden", reason):
        return Unavailable(
            f"The registry {registry} gives no access to {reference.repository}: it does not exist, or needs a login.",
            hint=f"skopeo login {registry}",
        )
    if re.search(r"manifest unknown|name unknown|not found|NAME_UNKNOWN|MANIFEST_UNKNOWN", reason):
        return Unavailable(
            f"The registry {registry} has no image {reference}.",
            hint=f"skopeo list-tags docker://{reference.repository}",
        )
    if re.search(r"timeout|deadline exceeded|EOF|connection reset|broken pipe", reason):
        return Unavailable(f"The registry {registry} cannot be reached: {_brief(reason)}.", hint=without)
    return Unavailable(
        f"The registry {registry} did not deliver {reference}: {_brief(reason)}.",
        hint="FCVM_LOG=debug shows the command",
    )


def _command(reference: Reference) -> list[str]:
    """skopeo with the options that every call has; for Podman's storage in mounts of its own, as skopeo leaves one."""
    command = [process.find("skopeo"), "--override-os=linux", f"--override-arch={architecture()}"]
    if not any((Path.home() / policy).exists() for policy in POLICIES):
        command.append("--insecure-policy")
    if os.environ.get("CONTAINERS_REGISTRIES_CONF"):
        command.append(f"--registries-conf={os.environ['CONTAINERS_REGISTRIES_CONF']}")
    if reference.transport == "containers-storage" and os.geteuid() == 0:
        command = [process.find("unshare", package="util-linux"), "--mount", *command]
    return command


def _environment() -> dict[str, str]:
    """The user's own, whole: what steers skopeo is not ours to list, least of all what its credential helpers read; PATH is as for others."""
    return {name: value for name, value in os.environ.items() if name != "PATH"}


def _size(directory: Path) -> int:
    total = 0
    for path in (directory, directory.with_name(directory.name + ".tmp")):
        try:
            total += sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
        except FileNotFoundError:  # not made yet, or a temporary file that has just been renamed
            continue
    return total


def _short(said: str) -> str:
    return re.sub(r"(sha256:[0-9a-f]{12})[0-9a-f]{52}", r"\1", said.strip().rpartition("\n")[2])[:60].lower()


def _brief(reason: str) -> str:
    """The last parts of Go's chain of reasons, which are the ones that say something."""
    parts = re.split(r": ", reason.strip().rstrip("."))
    return ": ".join(parts[-2:])[:200]
