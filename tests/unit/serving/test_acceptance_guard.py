"""One warning when next to nothing is accepted, and none otherwise."""

from __future__ import annotations

import logging

import pytest
import torch

from verl_speculator.serving.acceptance_guard import AcceptanceGuard


@pytest.mark.parametrize(("accepted", "warns"), [(0, True), (15, True), (25, False), (1000, False)])
def test_warns_once_after_the_first_drafts(accepted: int, warns: bool, caplog) -> None:
    guard = AcceptanceGuard(torch.device("cpu"))
    with caplog.at_level(logging.WARNING):
        guard.count(torch.tensor([0, 0, 0]), 0)  # a step without drafts
        guard.count(torch.tensor([accepted, 0]), 999)
        assert not caplog.records, "too early to tell"
        for _ in range(3):
            guard.count(torch.tensor([0]), 1)
    assert len(caplog.records) == warns
    if warns:
        text = caplog.records[0].getMessage()
        assert text.startswith(f"Of the first 1000 drafts only {accepted} tokens were accepted")
        for cause in ("another base model", "quantisation", "LoRA", "weights were not loaded"):
            assert cause in text
