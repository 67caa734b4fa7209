"""What every test starts from: no network, one seed, few threads."""

import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel, logging

from tiny import make_experts, tiny_base

# a deadline would make the tests depend on how busy the machine is
settings.register_profile("xloom", deadline=None)
settings.load_profile("xloom")


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
    monkeypatch.setenv("XLOOM_CACHE", str(tmp_path / "xloom-cache"))
    torch.manual_seed(0)
    logging.set_verbosity_error()


@pytest.fixture(scope="session")
def _llama() -> PreTrainedModel:
    return tiny_base("llama")


@pytest.fixture
def llama(_llama: PreTrainedModel) -> PreTrainedModel:
    """A tiny random Llama in float32, fresh for each test."""
    import copy

    return copy.deepcopy(_llama)


@pytest.fixture(scope="session")
def expert_paths(_llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three experts of the tiny Llama with different ranks and targets, as PEFT folders."""
    return make_experts(_llama, tmp_path_factory.mktemp("experts"))
