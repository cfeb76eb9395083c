"""Which Debian mirror to use: the one that the host's own apt is configured with.

Both formats of apt's sources are read: one-line (``sources.list``) and deb822 (``*.sources``), see sources.list(5).
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fc_agent.structs import Struct

APT = Path("/etc/apt")

# Names a Debian archive gives its releases; a third party's suites are seldom called so.
SUITES = frozenset(
    (
        "bullseye",
        "bookworm",
        "trixie",
        "forky",
        "duke",
        "sid",
        "oldoldstable",
        "oldstable",
        "stable",
        "testing",
        "unstable",
    )
)
POCKETS = ("-updates", "-security", "-backports", "-proposed-updates", "/updates")


class Source(Struct):
    """One archive: a URI with its suites and components."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]


class Mirrors(Struct):
    """The URI of Debian's archive and that of its security archive (None: unknown)."""

    main: str
    security: str | None


def parse_list(text: str) -> Iterator[Source]:
    """The ``deb`` lines of a ``sources.list``; lines that apt would not take are skipped."""
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[[^]]*\]\s*)?(\S+)\s+(\S+)\s*([^#]*)", line)
        if match:
            yield Source(match[1], (match[2],), tuple(match[3].split()))


def parse_deb822(text: str) -> Iterator[Source]:
    """The enabled ``deb`` stanzas of a ``.sources`` file."""
    for stanza in re.split(r"\n[ \t]*\n", text):
        fields = _fields(stanza)
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() not in ("no", "false"):
            for uri in fields.get("uris", "").split():
                yield Source(uri, tuple(fields.get("suites", "").split()), tuple(fields.get("components", "").split()))


def _fields(stanza: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line.startswith("#"):
            continue
        if line[:1].isspace():  # continues the field above
            if name:
                fields[name] += " " + line.strip()
        elif ":" in line:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            fields[name] = value.strip()
    return fields


def read(apt: Path = APT) -> list[Source]:
    """All sources of the host, in apt's order; a file that cannot be read is skipped."""
    sources: list[Source] = []
    for path in [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*"))]:
        parse = {".list": parse_list, ".sources": parse_deb822}.get(path.suffix)
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        if parse:
            sources += parse(text)
    return sources


def mirrors(sources: Iterable[Source]) -> Mirrors | None:
    """Debian's archives among the sources; None when there is none, as on another distribution.

    A third party may call its suite ``bookworm`` too. Debian's own archive is told by also being asked for the
    ``-updates`` pocket, or else by being the first.
    """
    main: dict[str, bool] = {}
    security: str | None = None
    for source in sources:
        if "main" not in source.components:
            continue
        for suite in source.suites:
            name, pocket = _split(suite)
            if name not in SUITES:
                continue
            if pocket in ("-security", "/updates"):
                security = security or source.uri
            elif pocket in ("", "-updates"):
                main[source.uri] = main.get(source.uri, False) or pocket == "-updates"
    if not main:
        return None
    return Mirrors(next((uri for uri, updates in main.items() if updates), next(iter(main))), security)


def _split(suite: str) -> tuple[str, str]:
    for pocket in POCKETS:
        if suite.endswith(pocket):
            return suite.removesuffix(pocket), pocket
    return suite, ""


def lines(found: Mirrors, suite: str) -> list[str]:
    """The ``deb`` lines for ``suite``, with its updates and, where known, its security updates."""
    if suite in ("sid", "unstable"):
        return [f"deb {found.main} {suite} main"]
    result = [f"deb {found.main} {suite} main", f"deb {found.main} {suite}-updates main"]
    if found.security:
        result.append(f"deb {found.security} {suite}-security main")
    return result
