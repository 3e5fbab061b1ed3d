"""The number of drafts to serve with, from what a load test measured."""

from __future__ import annotations

import itertools
import random

import pytest

from verl_speculator.evaluation.load_results import LoadResult, best_schedule


def result(drafts: int, concurrency: int, tokens_per_second: float) -> LoadResult:
    return LoadResult(f"{drafts} drafts", drafts, concurrency, tokens_per_second, 1, 2, 3, 4, None)


@pytest.mark.parametrize(
    ("speeds", "schedule"),
    [
        ({1: [10, 15, 18], 4: [30, 36, 33], 16: [90, 80, 60]}, [(1, 3, 2), (4, 15, 1), (16, 16, 0)]),
        ({1: [10, 9], 8: [20, 19]}, [(1, 8, 0)]),
        ({2: [10, 11], 8: [20, 30]}, [(1, 8, 1)]),
        ({4: [5, 6, 7]}, [(1, 4, 2)]),
    ],
)
def test_each_measured_load_stands_for_those_up_to_the_next(speeds, schedule) -> None:
    results = [result(drafts, level, speed) for level, row in speeds.items() for drafts, speed in enumerate(row)]
    random.Random(0).shuffle(results)
    assert best_schedule(results) == schedule


def test_vllm_reads_it_as_it_is_meant() -> None:
    utils = pytest.importorskip("vllm.v1.spec_decode.dynamic.utils")
    speeds = {1: [1, 2, 3], 4: [1, 3, 2], 16: [3, 2, 1]}
    results = [result(drafts, level, speed) for level, row in speeds.items() for drafts, speed in enumerate(row)]
    lookup = utils.build_dynamic_sd_schedule_lookup(best_schedule(results), 32, 2)
    expected = [2] * 3 + [1] * 12 + [0] * 17
    assert lookup[1:] == expected
    assert all(fewer >= more for fewer, more in itertools.pairwise(lookup[1:]))
