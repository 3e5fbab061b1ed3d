"""How a scorer is named as a rule."""

from __future__ import annotations

import pytest

from verl_speculator.errors import ConfigError
from verl_speculator.scorer.rule import scorer_folders, written


@pytest.mark.parametrize(
    ("text", "folders", "thresholds"),
    [
        ("scorer:head", ["head"], None),
        ("scorer:a/b+c", ["a/b", "c"], None),
        ("scorer:a+c@0.25", ["a", "c"], ((0, 0.25),)),
        ("scorer:a@0.9,16:0.7,32:0.05", ["a"], ((0, 0.9), (16, 0.7), (32, 0.05))),
    ],
)
def test_names_are_read_and_written(text, folders, thresholds):
    assert scorer_folders(text) == (folders, thresholds)
    assert written(folders, thresholds) == text


def test_other_rules_name_no_folder():
    assert scorer_folders("kl:0.4,0.5") == ([], None)
    assert scorer_folders("strict") == ([], None)


@pytest.mark.parametrize("given", ["high", "0.9,0.5", "0.9,x:0.5", "0.9,3:0.5,2:0.4", "0.9,0:0.5", "0.9,4:0.5,4:0.6"])
def test_thresholds_that_are_none(given):
    with pytest.raises(ConfigError, match="after @"):
        scorer_folders(f"scorer:head@{given}")
