from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest


class ChatData(NamedTuple):
    train: Path
    val: Path


@pytest.fixture(scope="session", autouse=True)
def rows_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave no training rows behind in the user's cache of `datasets`."""
    # Before it is loaded, here or in a process that is started.
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Hugging Face model with random weights. Tests that change it take a copy."""
    from tests.support.tiny import write_base_model

    return write_base_model(tmp_path_factory.mktemp("base_model"))


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory: pytest.TempPathFactory) -> ChatData:
    """Chats of 64 and 8 rows in parquet."""
    from tests.support.tiny import write_chats

    folder = tmp_path_factory.mktemp("chat_data")
    return ChatData(write_chats(folder / "train.parquet", 64), write_chats(folder / "val.parquet", 8, seed=1))
