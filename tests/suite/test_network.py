"""Opt-in: really asks the package index. Run with XLOOM_NETWORK_TESTS=1."""

import os
from pathlib import Path

import pytest

from xloom.hub.fetch import MODLAMP, fetch, read_member


@pytest.mark.network
@pytest.mark.skipif(os.environ.get("XLOOM_NETWORK_TESTS") != "1", reason="set XLOOM_NETWORK_TESTS=1 to run")
def test_pip_fetches_the_smallest_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLOOM_CACHE", str(tmp_path))
    wheel = fetch(MODLAMP)
    assert wheel.stat().st_size == MODLAMP.size
    assert read_member(wheel, "modlamp/data/AMPvsUniProt.csv").startswith(b"5200,1,UniProt,AMP\n")
