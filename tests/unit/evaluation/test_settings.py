from __future__ import annotations

import pytest

from verl_speculator.errors import ConfigError
from verl_speculator.evaluation.settings import EvaluationSettings, label_paths


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"num_prompts": 0}, "--limit must be at least 1, got 0"),
        ({"num_draft_tokens": (2, 0)}, "--num-draft-tokens must be at least 1, got 0"),
        ({"num_draft_tokens": (2, 1, 2)}, "--num-draft-tokens names the same number twice"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "--temperature must be"),
        ({"temperature": float("nan")}, "--temperature must be"),
        ({"top_p": 0.0}, "--top-p must be above 0"),
        ({"top_p": 1.5}, "--top-p must be above 0"),
        ({"top_k": -1}, "--top-k must be 0"),
        ({"dtype": "int8"}, "--dtype must be one of auto, float32"),
        ({"draft_sampling": "beam"}, "--draft-sampling must be one of greedy, random"),
    ],
)
def test_mistake_names_its_flag(values, message) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluationSettings(**values)


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["/out/demo/speculator"], ["demo/speculator"]),
        (["/runs/a/global_step_500/speculator"], ["a step 500"]),
        (["/runs/a/global_step_500"], ["a step 500"]),
        (["/runs/a/global_step_500", "/runs/a/global_step_90"], ["a step 500", "a step 90"]),
        (["/runs/a/global_step_5", "/runs/b/global_step_5"], ["a step 5", "b step 5"]),
        (["/x/run/global_step_5", "/y/run/global_step_5"], ["x/run step 5", "y/run step 5"]),
        (["/x/one", "/y/two"], ["one", "two"]),
        (["/x/same", "/x/same"], ["same (1)", "same (2)"]),
        (["owner/name", "/runs/a/global_step_5"], ["owner/name", "a step 5"]),
    ],
)
def test_labels_are_short_and_tell_apart(paths, labels) -> None:
    assert label_paths(tuple(paths)) == labels


@pytest.mark.parametrize(
    ("batch_size", "advice"),
    [
        (4, "lower --batch-size=4, then --max-new-tokens=128"),
        (1, "lower --max-new-tokens=128, or use --dtype bfloat16"),
    ],
)
def test_says_what_to_lower_when_memory_runs_out(batch_size, advice) -> None:
    assert EvaluationSettings(batch_size=batch_size).memory_advice == advice
