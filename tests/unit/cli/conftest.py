from __future__ import annotations

import json
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from tests.unit.serving.conftest import HIDDEN, VOCAB, make_speculator
from verl_speculator.serving import preflight

__all__ = ["make_speculator"]


@pytest.fixture
def engine(monkeypatch) -> None:
    """As if vLLM 0.28 and this package's plugin were installed."""
    monkeypatch.setattr(preflight, "_is_importable", lambda package: True)
    monkeypatch.setattr(preflight, "_installed_version", lambda: "0.28.0")
    ours = EntryPoint("verl_speculator", "verl_speculator.serving.plugin:register", "vllm.general_plugins")
    monkeypatch.setattr(preflight, "entry_points", lambda group: EntryPoints([ours]).select(group=group))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.fixture
def base(tmp_path: Path) -> str:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": HIDDEN, "vocab_size": VOCAB}))
    return str(folder)
