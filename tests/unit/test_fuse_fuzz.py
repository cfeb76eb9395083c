"""A bounded, seeded run of the fuzzer; ``make fuzz`` runs it for longer."""

import logging
from pathlib import Path

import fuse_fuzz
import pytest


@pytest.mark.parametrize("seed", range(6))
def test_hostile_messages(tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "fuse_pipe"):
        assert fuse_fuzz.run(tmp_path, seed, 1500, read_only=seed % 3 == 2) > 300
    assert [record for record in caplog.records if record.exc_info] == []
