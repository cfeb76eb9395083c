"""Reading the host's apt sources, in both formats, and telling Debian's archive from a third party's."""

from pathlib import Path

import pytest

from fcvm.setup import sources
from fcvm.setup.sources import Mirrors, Source

ONE_LINE = """\
# deb http://commented.example/debian bookworm main
deb http://mirror.example/debian bookworm main contrib # a comment
deb [arch=amd64 signed-by=/a.gpg] http://mirror.example/debian bookworm-updates main
deb-src http://mirror.example/debian bookworm main
  deb http://security.example/debian-security bookworm-security main
deb cdrom:[Debian] bookworm
nonsense
"""

DEB822 = """\
Types: deb deb-src
# a comment
URIs: http://mirror.example/debian
 https://second.example/debian/
Suites: trixie
  trixie-updates
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 xsFNBF

Types: deb
URIs: http://off.example/debian
Suites: trixie
Components: main
Enabled: no

Types: deb-src
URIs: http://source.example/debian
Suites: trixie
Components: main
"""


def test_one_line_sources() -> None:
    assert list(sources.parse_list(ONE_LINE)) == [
        Source("http://mirror.example/debian", ("bookworm",), ("main", "contrib")),
        Source("http://mirror.example/debian", ("bookworm-updates",), ("main",)),
        Source("http://security.example/debian-security", ("bookworm-security",), ("main",)),
        Source("cdrom:[Debian]", ("bookworm",), ()),
    ]


def test_deb822_sources() -> None:
    suites = ("trixie", "trixie-updates")
    assert list(sources.parse_deb822(DEB822)) == [
        Source("http://mirror.example/debian", suites, ("main",)),
        Source("https://second.example/debian/", suites, ("main",)),
    ]


def test_all_files_of_apt_are_read(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("deb http://first.example/ bookworm main\n")
    (tmp_path / "sources.list.d/b.sources").write_text("Types: deb\nURIs: http://third.example/\nSuites: sid\n")
    (tmp_path / "sources.list.d/a.list").write_text("deb http://second.example/ bookworm main\n")
    (tmp_path / "sources.list.d/a.list.disabled").write_text("deb http://never.example/ bookworm main\n")
    hosts = [source.uri.split("/")[2].split(".")[0] for source in sources.read(tmp_path)]
    assert hosts == ["first", "second", "third"]


def test_a_host_without_apt_has_no_sources(tmp_path: Path) -> None:
    assert sources.read(tmp_path / "missing") == []


MAIN = Source("http://mirror.example/debian", ("bookworm", "bookworm-updates"), ("main",))
SECURITY = Source("http://security.example/", ("bookworm-security",), ("main",))
OLD_SECURITY = Source("http://security.example/", ("bullseye/updates",), ("main",))
BACKPORTS = Source("http://backports.example/", ("bookworm-backports",), ("main",))
DOCKER = Source("https://docker.example/debian", ("bookworm",), ("stable",))
THIRD = Source("https://vpn.example/debian", ("bookworm",), ("main",))
OTHER = Source("https://node.example/", ("nodistro",), ("main",))


@pytest.mark.parametrize(
    ("configured", "expected"),
    [
        ([MAIN, SECURITY], Mirrors(MAIN.uri, SECURITY.uri)),
        ([SECURITY, MAIN, BACKPORTS], Mirrors(MAIN.uri, SECURITY.uri)),
        ([MAIN, OLD_SECURITY], Mirrors(MAIN.uri, OLD_SECURITY.uri)),
        ([THIRD, DOCKER, OTHER, MAIN], Mirrors(MAIN.uri, None)),
        ([Source("file:///media/debian", ("trixie",), ("main",)), THIRD], Mirrors("file:///media/debian", None)),
        ([DOCKER, OTHER, BACKPORTS, SECURITY], None),
        ([], None),
    ],
)
def test_debians_archive_is_found_among_others(configured: list[Source], expected: Mirrors | None) -> None:
    assert sources.mirrors(configured) == expected


def test_the_lines_for_another_release() -> None:
    assert sources.lines(Mirrors("http://m/debian", "http://s/"), "trixie") == [
        "deb http://m/debian trixie main",
        "deb http://m/debian trixie-updates main",
        "deb http://s/ trixie-security main",
    ]
    assert sources.lines(Mirrors("http://m/debian", None), "trixie")[2:] == []
    assert sources.lines(Mirrors("http://m/debian", "http://s/"), "sid") == ["deb http://m/debian sid main"]
