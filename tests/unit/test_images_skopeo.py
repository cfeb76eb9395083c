"""What skopeo prints, and the one sentence that we make of it; the outputs are those of real runs of skopeo 1.9."""

from pathlib import Path

import pytest

from fcvm.errors import ImageError
from fcvm.images import pull, reference, skopeo

REFUSED = 'pinging container registry 127.0.0.1:1: Get \\"https://127.0.0.1:1/v2/\\": dial tcp 127.0.0.1:1: connect: connection refused'
NO_HOST = 'pinging container registry r.invalid: Get \\"https://r.invalid/v2/\\": dial tcp: lookup r.invalid on 10.0.0.1:53: no such host'
TIMEOUT = 'pinging container registry r.example: Get \\"https://r.example/v2/\\": dial tcp 192.0.2.1:443: i/o timeout'


@pytest.mark.parametrize(
    ("text", "said", "expected"),
    [
        ("127.0.0.1:1/x", REFUSED, "The registry 127.0.0.1:1 cannot be reached: connection refused."),
        ("r.invalid/x", NO_HOST, "The registry r.invalid cannot be reached: no such host."),
        ("r.example/x", TIMEOUT, "The registry r.example cannot be reached: i/o timeout."),
        ("r.example/x", "http: server gave HTTP response to HTTPS client", "The registry r.example speaks plain HTTP"),
        ("r.example/x", "x509: certificate signed by unknown authority", "certificate signed by unknown authority."),
        ("r.example/x:1", "reading manifest 1 in r.example/x: manifest unknown: manifest unknown",
         "The registry r.example has no image r.example/x:1."),
        ("r.example/x", "reading manifest latest in r.example/x: unauthorized: authentication required", "needs a login"),
        ("docker.io/x/y", "requested access to the resource is denied", "does not exist, or needs a login"),
        ("r.example/x", "toomanyrequests: You have reached your pull rate limit", "allows no more downloads"),
        ("r.example/x", "writing blob: write /tmp/x: no space left on device", "There is no space left"),
        ("r.example/x", "no image found in manifest list for architecture amd64, variant, OS linux", "this host runs amd64"),
        ("r.example/x", "Source image rejected: A signature was required", "signature policy"),
        ("r.example/x", "something new: of which we know nothing", "something new: of which we know nothing"),
        ("docker-archive:/x.tar", "loading tar component manifest.json: unexpected EOF", "/x.tar is damaged"),
        ("docker-archive:/x.tar", "open /x.tar: permission denied", "/x.tar cannot be read"),
        ("docker-archive:/x.tar:y", 'Tag \\"y\\" not found', "does not hold the one image"),
        ("oci:/x", "open /x/index.json: no such file or directory", "/x is damaged, or not an image"),
        ("containers-storage:x", "does not resolve to an image ID: identifier is not an image", "Podman's storage has no image x"),
        ("docker-daemon:x:1", "Cannot connect to the Docker daemon at unix:///var/run/docker.sock", "daemon cannot be reached"),
        ("docker-daemon:x:1", "Error response from daemon: reference does not exist", "daemon has no image x:1"),
    ],
)  # fmt: skip
def test_one_sentence(text: str, said: str, expected: str) -> None:
    output = f'time="2026-01-01T00:00:00Z" level=warning msg="noise"\ntime="2026-01-01T00:00:00Z" level=fatal msg="Error: {said}"\n'
    error = skopeo.explain(reference.parse(text), output)
    assert expected in error.message
    assert "level=" not in error.message
    assert error.message.endswith(".")
    assert error.hint
    assert len(error.message) < 300


def test_output_without_a_message() -> None:
    assert "killed" in skopeo.explain(reference.parse("dir:/x"), "noise\nkilled").message
    assert skopeo.explain(reference.parse("dir:/x"), "").message


def entry(architecture: str, digest: str, variant: str = "", os: str = "linux") -> str:
    return f'{{"digest":"{digest}","platform":{{"os":"{os}","architecture":"{architecture}","variant":"{variant}"}}}}'


def test_the_list_entry_for_this_host() -> None:
    ours = skopeo.architecture()
    text = ",".join([entry("s390x", "a"), entry(ours, "b", os="windows"), entry(ours, "c", "v3"), entry(ours, "d"),
                     entry("unknown", "e", os="unknown")])  # fmt: skip
    assert pull.choose(f'{{"manifests":[{text}]}}'.encode(), "x") == "d"
    assert pull.choose(b'{"config":{},"layers":[]}', "x") is None


def test_a_list_without_this_host() -> None:
    with pytest.raises(ImageError, match=r"linux/ppc64le, linux/s390x, and this host runs"):
        pull.choose(f'{{"manifests":[{entry("s390x", "a")},{entry("ppc64le", "b")},{entry("unknown", "c")}]}}'.encode(), "x")


@pytest.mark.parametrize("raw", [b"", b"<html>", b'{"manifests":[{}]}', b'{"manifests":[{"platform":[1],"digest":"x"}]}', b'{"manifests":3}', b"[]"])
def test_a_registry_that_talks_nonsense(raw: bytes) -> None:
    if raw == b"[]":
        assert pull.choose(raw, "x") is None  # and the manifest's own parser refuses it
        return
    with pytest.raises(ImageError, match="delivers no manifest"):
        pull.choose(raw, "x")


def test_skopeo_and_its_credential_helpers_have_the_users_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "skopeo").write_text("#!/bin/sh\nenv\n")
    (tmp_path / "skopeo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path=/run/user/1000/bus")
    seen = skopeo.inspect(reference.parse("r.example/x")).decode().splitlines()
    assert "AWS_PROFILE=work" in seen
    assert "DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/1000/bus" in seen
    assert f"PATH={tmp_path}:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin" in seen
