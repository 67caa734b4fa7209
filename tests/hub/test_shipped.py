"""Where shipped experts and models lie."""

from pathlib import Path

import pytest

from xloom.errors import NotFoundError
from xloom.hub import shipped


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shipped, "_ROOTS", (tmp_path / "nowhere", tmp_path))
    return tmp_path


def test_folders_are_found_by_name_and_hidden_ones_are_not(root: Path):
    for name in ("b", "a", ".a-unfinished", "empty"):
        (root / "models" / name).mkdir(parents=True)
        if name != "empty":
            (root / "models" / name / "config.json").touch()
    assert shipped.model_folders() == {"a": root / "models" / "a", "b": root / "models" / "b"}
    assert list(shipped.model_folders()) == ["a", "b"]
    assert shipped.model_folder("b") == root / "models" / "b"
    with pytest.raises(NotFoundError, match="no shipped model 'c'; there are a, b"):
        shipped.model_folder("c")


def test_nothing_shipped_is_said(root: Path):
    (root / "experts" / ".tmp").mkdir(parents=True)
    (root / "experts" / ".tmp" / "adapter_config.json").touch()
    with pytest.raises(NotFoundError, match="expected the experts that are shipped"):
        shipped.expert_folders()
