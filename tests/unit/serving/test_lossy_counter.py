from __future__ import annotations

import logging

import torch
from prometheus_client import REGISTRY

from verl_speculator.serving import lossy_counter


def test_the_counter_is_told_what_is_new_and_the_log_now_and_then(monkeypatch, caplog) -> None:
    monkeypatch.setattr(lossy_counter.time, "monotonic", iter([0.0, 1.0, 11.0, 11.0, 12.0, 13.0]).__next__)
    caplog.set_level(logging.INFO, "vllm.verl_speculator")
    before = REGISTRY.get_sample_value(f"{lossy_counter.NAME}_total") or 0
    counter = lossy_counter.LossyCounter(torch.device("cpu"))
    for count in (3, 0, 2, 4):
        counter.add(torch.tensor(count))
    assert REGISTRY.get_sample_value(f"{lossy_counter.NAME}_total") == before + 9
    assert [record.getMessage() for record in caplog.records] == [
        "Lossy: 5 drafts so far were kept by the acceptance rule alone."
    ]
    # A second engine of this process, and one after vLLM has cleared its names.
    monkeypatch.setattr(lossy_counter.time, "monotonic", lambda: 0.0)
    lossy_counter.LossyCounter(torch.device("cpu")).add(torch.tensor(1))
    assert REGISTRY.get_sample_value(f"{lossy_counter.NAME}_total") == before + 10
    REGISTRY.unregister(lossy_counter._counter())
    lossy_counter.LossyCounter(torch.device("cpu")).add(torch.tensor(2))
    assert REGISTRY.get_sample_value(f"{lossy_counter.NAME}_total") == 2
