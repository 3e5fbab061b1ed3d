from __future__ import annotations

import pytest
import torch

from verl_speculator.errors import ConfigError
from verl_speculator.evaluation.memory import explain_out_of_memory
from verl_speculator.evaluation.settings import EvaluationSettings


def real_cpu_error() -> None:
    torch.empty(1 << 60)


def accelerator_error() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize("fail", [real_cpu_error, accelerator_error])
@pytest.mark.parametrize(
    ("batch_size", "advice"),
    [
        (4, "lower --batch-size=4, then --max-new-tokens=128"),
        (1, "lower --max-new-tokens=128, or use --dtype bfloat16"),
    ],
)
def test_says_what_to_lower(fail, batch_size, advice) -> None:
    with (
        pytest.raises(ConfigError, match=f"^out of memory while decoding: {advice}"),
        explain_out_of_memory("decoding", EvaluationSettings(batch_size=batch_size)),
    ):
        fail()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory("decoding", EvaluationSettings()):
        raise RuntimeError("shapes do not match")
