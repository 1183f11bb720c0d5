"""One thread, no network, no progress bars, pictures only where they are looked at, and a fixed seed before every test."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: nothing here may reach out
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers.utils import logging

from optimum_stat import plots

torch.set_num_threads(1)
logging.disable_progress_bar()


def pytest_collection_finish() -> None:
    """What imports have made stays: else Trainer looks for garbage in it before every run, a third of a second each time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed of torch's own generator at the start of every test."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without matplotlib, an extra, unless the test is marked "pictures": drawing takes longer than pruning a tiny model."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr(plots, "available", lambda: False)
