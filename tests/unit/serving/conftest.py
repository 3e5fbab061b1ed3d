from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from verl_speculator.models import (
    ArcticLSTMSpeculator,
    ArcticLSTMSpeculatorConfig,
    MLPSpeculator,
    MLPSpeculatorConfig,
    Speculator,
)

HIDDEN, VOCAB, HEADS = 18, 37, 3


@pytest.fixture
def make_speculator(tmp_path: Path) -> Callable[..., tuple[Speculator, Path]]:
    """`make_speculator(kind, **settings)`: a speculator with random weights and the folder it was saved to."""

    def make(kind: str = "mlp", **settings: Any) -> tuple[Speculator, Path]:
        common = {
            "input_hidden_dim": HIDDEN,
            "vocab_size": VOCAB,
            "n_predict": HEADS,
            "torch_dtype": "float32",
        } | settings
        torch.manual_seed(0)
        speculator: Speculator
        if kind == "mlp":
            speculator = MLPSpeculator(MLPSpeculatorConfig(**{"inner_dim": 24, **common}))
        else:
            widths = {"inner_dim": "24", "emb_dim": "24", "proj_dim": "24"} | common
            speculator = ArcticLSTMSpeculator(ArcticLSTMSpeculatorConfig(**widths, method=kind))
        for parameter in speculator.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        folder = tmp_path / "speculator"
        speculator.save_pretrained(folder)
        return speculator, folder

    return make


def logits(speculator: Speculator) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 5, HIDDEN, generator=generator)
    tokens = torch.randint(VOCAB, (2, 5 + speculator.n_predict), generator=generator)
    with torch.no_grad():
        return speculator(hidden, tokens)
