"""The scorer's world, and its experiment with models that know nothing."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace

import pytest

from examples.scorer import run
from examples.scorer.settings import BUDGETS
from examples.scorer.world import END, LABELS, STYLES, VOCABULARY, Tongue, problems, tokenizer
from verl_speculator import cli

WORDS = set(VOCABULARY)


def test_answers_are_those_of_the_sum():
    for problem in problems(50, seed=3):
        value, *steps = problem.text.removesuffix(" ?").removeprefix("x ").split()
        value = int(value)
        for label, op, number in zip(steps[::3], steps[1::3], steps[2::3], strict=True):
            assert label in LABELS
            value += int(number) if op == "plus" else -int(number)
        assert value % 10 == problem.answer


def results(problem, words):
    """Of each step that is not skipped: number before, operation, number, result."""
    for place in (place for place, word in enumerate(words) if word in LABELS and words[place - 1] != "skip"):
        before, op, number, _, result = words[place + 1 : place + 6]
        assert (op, int(number)) in problem.steps
        yield int(before), op, int(number), int(result)


@pytest.mark.parametrize("speaker", ["target", "draft"])
def test_a_solution_goes_wrong_by_slips_and_skips_alone(speaker):
    tongue, generator = Tongue(speaker), random.Random(0)
    wrong, sums, skipped = Counter(), Counter(), 0
    for problem in problems(800, seed=5):
        words = tongue.solve(problem, generator)
        assert set(words) <= WORDS
        assert words[-4:-2] == ["answer", "is"]
        assert words[-1] == END
        skipped += "skip" in words
        value, steps = problem.start, list(results(problem, words))
        for before, op, number, result in steps:
            assert before == value
            right = (before + number if op == "plus" else before - number) % 10
            assert result == right or result in tongue.wrong_results[before, op, number]
            sums[words[1]] += 1
            wrong[words[1]] += result != right
            value = result
        assert int(words[-2]) == value
    assert skipped
    shares = {style: wrong[style] / sums[style] for style in STYLES}
    assert (
        max(shares.values()) - min(shares.values()) < 0.05
        if speaker == "target"
        else (shares["loosely"] < shares["stepwise"] - 0.05 < shares["formally"] - 0.3)
    )


def test_a_speaker_that_is_sure_says_what_it_says_most_often():
    tongue, generator = Tongue("target"), random.Random(1)
    said = Counter()
    for problem in problems(6000, seed=6):
        said.update(results(problem, tongue.solve(problem, generator)))
    problem = next(problems(1, seed=7, least_steps=5))
    sure = tongue.solve(problem, generator, sure=True)

    assert sure[1] == "stepwise"
    assert "skip" not in sure
    assert len(list(results(problem, sure))) == 5
    # Close races apart: there the count of a sample says little.
    for *sum_, result in ((*sum_, tongue.believes("stepwise", *sum_)) for sum_ in tongue.wrong_results):
        counts = sorted((said[(*sum_, other)] for other in range(10)), reverse=True)
        if counts[0] > 1.5 * counts[1]:
            assert said[(*sum_, result)] == counts[0]
    misbelieved = [
        sum_ for sum_ in tongue.wrong_results if tongue.believes("stepwise", *sum_) in tongue.wrong_results[sum_]
    ]
    assert 0 < len(misbelieved) < 20


def test_every_word_is_a_token():
    words = tokenizer()
    text = " ".join(VOCABULARY)

    assert words(text)["input_ids"] == list(range(len(VOCABULARY)))
    assert words.decode(words(text)["input_ids"]) == text
    asked = words.apply_chat_template([{"role": "user", "content": "x 1 a plus 2 ?"}], tokenize=False)
    assert words(asked)["input_ids"] == words("x 1 a plus 2 ?")["input_ids"]


def in_process(command, log_file, progress, describe):
    """The command without a process of its own, which would load everything again."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert cli.main(command) == 0
    return printed.getvalue()


def test_the_experiment_runs_to_its_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "run_command", in_process)
    # GRPO has its own tests, under Ray.
    no_steps = replace(BUDGETS["small"].windows, steps=0)
    small = replace(BUDGETS["small"], windows=no_steps, answers=no_steps)
    hard = replace(small, gates=replace(small.gates, least_accuracy=0.99, most_accuracy=1.0))
    monkeypatch.setitem(run.BUDGETS, "small", hard)
    with pytest.raises(SystemExit, match="would prove nothing"):
        run.main(["--output", str(tmp_path), "--budget", "small", "--seed", "3"])
    assert "FAIL  the target answers" in capsys.readouterr().out
    assert not (tmp_path / "scorers").exists()

    monkeypatch.setitem(run.BUDGETS, "small", small)
    assert run.main(["--output", str(tmp_path), "--budget", "small", "--seed", "3"]) == 0

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["rules"]) == ["strict", "accept-all", "probability", "autojudge", "supervised", "oracle"]
    for rule in summary["rules"].values():
        assert {"tokens_per_target_call", "accuracy", "accuracy_loss_upper_95", "num_prompts"} <= rule.keys()
    assert summary["rules"]["strict"]["num_prompts"] == small.world.num_test
    assert not summary["rules"]["strict"]["is_lossy"]
    assert summary["rules"]["probability"]["is_lossy"]
    assert (tmp_path / "report" / "index.html").is_file()
    printed = capsys.readouterr().out
    assert "ok    area under the curve" in printed
    assert "All rules but strict are lossy" in printed
    assert run.main(["--output", str(tmp_path), "--budget", "small", "--seed", "3"]) == 0
    assert capsys.readouterr().out.count("done before") == 9
