from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from verl_speculator.models import ArcticLSTMSpeculator, ArcticLSTMSpeculatorConfig


@pytest.fixture
def good_run(base_model: Path, chat_data, tmp_path: Path) -> list[str]:
    """Overrides of a run with nothing wrong in it."""
    return [
        f"model.partial_pretrain={base_model}",
        f"data.train_files={chat_data.train}",
        f"data.val_files={chat_data.val}",
        f"trainer.default_local_dir={tmp_path / 'checkpoints'}",
        *(f"model.speculator.{name}_dim=16" for name in ("inner", "emb", "proj")),
    ]


@pytest.fixture
def write_speculator() -> Callable[..., Path]:
    """Write a speculator folder that fits the tiny base model unless told otherwise."""

    def write(folder: Path, **changes) -> Path:
        sizes = {"input_hidden_dim": 32, "vocab_size": 384, "n_predict": 2, **changes}
        widths = {"inner_dim": 16, "emb_dim": 16, "proj_dim": 16}
        ArcticLSTMSpeculator(ArcticLSTMSpeculatorConfig(**sizes, **widths)).save_pretrained(folder)
        return folder

    return write


@pytest.fixture
def installed(monkeypatch) -> Callable[..., None]:
    """Pretend that of Megatron's packages those named are installed, and no others."""
    find_spec = importlib.util.find_spec

    def have(*modules: str) -> None:
        def find(name: str, package: str | None = None):
            top = name.partition(".")[0]
            if top not in ("megatron", "mbridge", "transformer_engine"):
                return find_spec(name, package)
            if name != top and not any(module.startswith(top) for module in modules):
                # As Python does for a part of a package that is not there.
                raise ModuleNotFoundError(f"No module named {top!r}")
            return find_spec("json") if name in modules else None

        monkeypatch.setattr("importlib.util.find_spec", find)

    return have
