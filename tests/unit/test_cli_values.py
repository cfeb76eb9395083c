"""Values on the command line."""

import pytest

from fcvm.cli import values
from fcvm.cli.ls import table
from fcvm.errors import NotFoundError, UsageError


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["A=1"], {"A": "1"}),
        (["A=1,B=2"], {"A": "1", "B": "2"}),
        (["C=x,y"], {"C": "x,y"}),
        (["C=x,y,D=z"], {"C": "x,y", "D": "z"}),
        (["A="], {"A": ""}),
        (["A=a=b"], {"A": "a=b"}),
        (['C="a,B=c"'], {"C": "a,B=c"}),
        (['A="x,B=y",C=z'], {"A": "x,B=y", "C": "z"}),
        (['A=1,C="a,B=c"'], {"A": "1", "C": "a,B=c"}),
        (["a=1,b-c=2"], {"a": "1", "b-c": "2"}),
        (['A="1"'], {"A": '"1"'}),  # as Podman: without a comma that separates, quotes are the value's own
        (['A="1",B="x,y"'], {"A": '"1"', "B": '"x,y"'}),
        (['A="x" and "y"'], {"A": '"x" and "y"'}),
        (['A="x,B=y" z'], {"A": '"x', "B": 'y" z'}),
        (['A="x,B=y'], {"A": '"x', "B": "y"}),
        (['A=["a","b"],B={"c":"d","e":1}'], {"A": '["a","b"]', "B": '{"c":"d","e":1}'}),
        (["A=1", "A=2"], {"A": "2"}),
        (["URL=http://h/?a=1&b=2,3"], {"URL": "http://h/?a=1&b=2,3"}),
        (["A=line\nline"], {"A": "line\nline"}),
        (["1A=2", "a/b=1,D=2"], {"1A": "2", "a/b": "1", "D": "2"}),  # as Podman: a name is what stands before the first '='
        (["A=1,2B=3"], {"A": "1,2B=3"}),  # a comma separates before the usual names only
        (['1A="x,B=y",C=z'], {"1A": "x,B=y", "C": "z"}),
    ],
)
def test_pairs(texts: list[str], expected: dict[str, str]) -> None:
    assert values.pairs(texts, "--env") == expected


def test_a_bare_name_takes_its_value_from_the_environment() -> None:
    assert values.pairs(["HOME", "UNSET"], "--env", environ={"HOME": "/h"}) == {"HOME": "/h"}


@pytest.mark.parametrize("text", ["=1", "A B=1", "A,B", "", "A=1,,B=2x,=3", "noequals"])
def test_malformed_pairs_name_the_option(text: str) -> None:
    if text == "A=1,,B=2x,=3":  # a comma that no NAME= follows belongs to the value
        assert values.pairs([text], "--env") == {"A": "1,", "B": "2x,=3"}
        return
    with pytest.raises(UsageError, match="--env"):
        values.pairs([text], "--env")


def test_labels_are_podmans() -> None:
    texts = ["app.kubernetes.io/name=web", "flag", "rule=Host(`a`),b=c", "empty=", "flag"]
    assert values.labels(texts, "--label") == {"app.kubernetes.io/name": "web", "flag": "", "rule": "Host(`a`),b=c", "empty": ""}
    with pytest.raises(UsageError, match="--label"):
        values.labels(["=x"], "--label")


def test_env_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_US", "here")
    monkeypatch.delenv("NOT_SET", raising=False)
    path = tmp_path / "env"
    path.write_text("# comment\n\nA=1\n2.a/b=2\nB=with spaces, and commas\n  C=x=y\nFROM_US\nNOT_SET\n")
    assert values.env_file(str(path)) == {"A": "1", "2.a/b": "2", "B": "with spaces, and commas", "C": "x=y", "FROM_US": "here"}


def test_only_a_newline_ends_a_line_of_an_env_file(tmp_path) -> None:
    path = tmp_path / "env"
    path.write_bytes("A=1\x0bB=2\nC=\x0c\x1c\u2028x\rD=\nG=a\x85b\r\nH=h\r\n\r\n".encode())
    assert values.env_file(str(path)) == {"A": "1\x0bB=2", "C": "\x0c\x1c\u2028x\rD=", "G": "a\x85b", "H": "h"}


def test_an_env_file_in_another_encoding_says_so(tmp_path) -> None:
    path = tmp_path / "env"
    path.write_bytes(b"A=\xe9\n")
    with pytest.raises(UsageError, match="not UTF-8") as caught:
        values.env_file(str(path))
    assert "iconv" in (caught.value.hint or "")


def test_env_file_errors_name_the_line(tmp_path) -> None:
    path = tmp_path / "env"
    for line in ("=2", "export B=2"):
        path.write_text(f"A=1\n{line}\n")
        with pytest.raises(UsageError, match="Line 2"):
            values.env_file(str(path))
    with pytest.raises(NotFoundError, match="missing"):
        values.env_file(str(tmp_path / "missing"))


@pytest.mark.parametrize(("text", "mib"), [("512", 512), ("512m", 512), ("2g", 2048), ("1.5GiB", 1536), ("2GB", 2048)])
def test_size(text: str, mib: int) -> None:
    assert values.size(text, "--mem") == mib


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "1q", "g", "nan", "inf"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="--mem"):
        values.size(text, "--mem")


def test_words() -> None:
    assert values.words("nginx -g 'daemon off;'", "--cmd") == ["nginx", "-g", "daemon off;"]
    with pytest.raises(UsageError, match="--cmd"):
        values.words("echo 'open", "--cmd")


def test_a_table_holds_no_commands_for_the_terminal() -> None:
    assert table([("NAME", "HEALTH"), ("vm", "\x1b[2Jwell\n"), ("größer", "-")]) == "NAME    HEALTH\nvm      ?[2Jwell?\ngrößer  -"
