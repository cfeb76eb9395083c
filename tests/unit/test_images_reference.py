"""Image references and the configuration of short names."""

from pathlib import Path

import pytest

from fcvm.errors import UsageError
from fcvm.images import reference, registries
from fcvm.images.registries import Registries

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("quay.io/org/name", "quay.io/org/name:latest"),
        ("quay.io/org/name:1.2", "quay.io/org/name:1.2"),
        ("docker://quay.io/a/b/c:x", "quay.io/a/b/c:x"),
        ("docker://nginx", "docker.io/library/nginx:latest"),
        ("docker://org/nginx:1", "docker.io/org/nginx:1"),
        (f"docker://nginx@{DIGEST}", f"docker.io/library/nginx@{DIGEST}"),
        ("docker.io/nginx", "docker.io/library/nginx:latest"),
        ("index.docker.io/nginx:1", "docker.io/library/nginx:1"),
        ("docker.io/org/nginx", "docker.io/org/nginx:latest"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x", "localhost:5000/x:latest"),
        ("127.0.0.1:5000/a/b:t", "127.0.0.1:5000/a/b:t"),
        ("[::1]:5000/x", "[::1]:5000/x:latest"),
        ("HOST/x", "HOST/x:latest"),
        (f"quay.io/x@{DIGEST}", f"quay.io/x@{DIGEST}"),
        (f"quay.io/x:tag@{DIGEST}", f"quay.io/x@{DIGEST}"),
        ("nginx", "nginx:latest"),
        ("nginx:1.25", "nginx:1.25"),
        ("org/nginx", "org/nginx:latest"),
        (f"nginx@{DIGEST}", f"nginx@{DIGEST}"),
        ("a__b/c--d.e", "a__b/c--d.e:latest"),
    ],
)
def test_names(text: str, full: str) -> None:
    parsed = reference.parse(text)
    assert str(parsed) == full
    assert parsed.transport == "docker"
    assert parsed.source == f"docker://{full}"
    assert reference.parse(full) == parsed


@pytest.mark.parametrize(
    ("text", "short", "localhost", "domain"),
    [
        ("nginx", True, False, ""),
        ("org/nginx", True, False, ""),
        ("localhost/nginx", False, True, "localhost"),
        ("localhost:5000/nginx", False, False, "localhost:5000"),
        ("quay.io/nginx", False, False, "quay.io"),
        ("dir:/x", False, False, ""),
    ],
)
def test_kinds_of_names(text: str, short: bool, localhost: bool, domain: str) -> None:
    parsed = reference.parse(text)
    assert (parsed.is_short, parsed.is_localhost, parsed.domain) == (short, localhost, domain)


@pytest.mark.parametrize(
    ("text", "full", "path"),
    [
        ("docker-archive:a.tar", "docker-archive:/here/a.tar", "/here/a.tar"),
        ("docker-archive:../a.tar:x:1", "docker-archive:/a.tar:x:1", "/a.tar"),
        ("docker-archive:/a.tar:@1", "docker-archive:/a.tar:@1", "/a.tar"),
        ("oci-archive:/a.tar", "oci-archive:/a.tar", "/a.tar"),
        ("oci:sub/layout:tag", "oci:/here/sub/layout:tag", "/here/sub/layout"),
        ("dir:.", "dir:/here", "/here"),
        ("docker-daemon:x:latest", "docker-daemon:x:latest", ""),
        ("containers-storage:[overlay@/a+/b]x", "containers-storage:[overlay@/a+/b]x", ""),
    ],
)
def test_other_transports(text: str, full: str, path: str) -> None:
    parsed = reference.parse(text, cwd="/here")
    assert (str(parsed), parsed.source, parsed.path) == (full, full, path)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "IMAGE"),
        ("Nginx", "nginx"),
        ("a b", "REGISTRY"),
        ("/etc/passwd", "docker-archive"),
        ("./image.tar", "docker-archive"),
        ("x:", "REGISTRY"),
        ("x@sha256:12", "64 hex digits"),
        ("quay.io/" + "-x", "REGISTRY"),
        ("docker-archive:", "PATH"),
        ("docker-daemon:", "NAME"),
        ("http://quay.io/x", "docker-archive"),
        ("-v", "REGISTRY"),
        ("x\n", "REGISTRY"),
    ],
)
def test_bad_references(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        reference.parse(text)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(("text", "is_id"), [("abcd", True), ("sha256:" + "0" * 64, True), ("abc", False), ("nginx", False)])
def test_ids(text: str, is_id: bool) -> None:
    assert reference.is_id(text) is is_id


def names(found: list[reference.Reference]) -> list[str]:
    return [str(one) for one in found]


def test_short_names_without_configuration() -> None:
    known = Registries({}, ())
    assert names(known.local(reference.parse("nginx:1"))) == ["localhost/nginx:1", "docker.io/library/nginx:1"]
    assert names(known.remote(reference.parse("nginx:1"))) == ["docker.io/library/nginx:1"]
    assert names(known.remote(reference.parse("org/nginx"))) == ["docker.io/org/nginx:latest"]


def test_short_names_with_search_registries_and_aliases() -> None:
    known = Registries({"fedora": "registry.example/fedora", "off": ""}, ("one.example", "two.example:5000"))
    assert names(known.remote(reference.parse("x"))) == ["one.example/x:latest", "two.example:5000/x:latest"]
    assert names(known.remote(reference.parse("fedora:40"))) == ["registry.example/fedora:40"]
    assert names(known.remote(reference.parse(f"fedora@{DIGEST}"))) == [f"registry.example/fedora@{DIGEST}"]
    assert names(known.remote(reference.parse("off")))[0] == "one.example/off:latest"
    assert names(known.local(reference.parse("fedora")))[:2] == ["registry.example/fedora:latest", "localhost/fedora:latest"]
    assert names(known.local(reference.parse("quay.io/x"))) == ["quay.io/x:latest"]


def test_the_users_configuration_is_read(tmp_path: Path) -> None:
    own = tmp_path / ".config/containers"
    (own / "registries.conf.d").mkdir(parents=True)
    (own / "registries.conf").write_text('unqualified-search-registries = ["one.example"]\n[aliases]\n"a" = "one.example/a"\n')
    (own / "registries.conf.d/1.conf").write_text('[aliases]\n"a" = "two.example/a"\n')
    found = registries.load({"HOME": str(tmp_path)})
    assert found.search == ("one.example",)
    assert found.aliases["a"] == "two.example/a"


def test_aliases_that_are_no_table_are_none(tmp_path: Path) -> None:
    named = tmp_path / "named.conf"
    named.write_text("aliases = 1")
    assert "1" not in registries.load({"HOME": str(tmp_path), "CONTAINERS_REGISTRIES_CONF": str(named)}).aliases


def test_a_file_named_by_the_environment_comes_first(tmp_path: Path) -> None:
    named = tmp_path / "named.conf"
    named.write_text('unqualified-search-registries = ["three.example"]')
    found = registries.load({"HOME": str(tmp_path), "CONTAINERS_REGISTRIES_CONF": str(named)})
    assert found.search == ("three.example",)


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / ".config/containers").mkdir(parents=True)
    (tmp_path / ".config/containers/registries.conf").write_text("not toml")
    with pytest.raises(UsageError, match=r"registries\.conf"):
        registries.load({"HOME": str(tmp_path)})
