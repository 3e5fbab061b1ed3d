"""The page is parsed as a browser would, and the JSON read back."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from verl_speculator.decoding import Interval
from verl_speculator.reports.evaluation import best_and_worst, render_page, write_report
from verl_speculator.trainer.metrics_log import MetricsLog

NASTY = "</script><script>alert(1)</script><!-- \" ' & \x00\x1b\ud800 \u202e </pre>"
VOID = {"meta", "link", "br", "hr", "input", "img"}


class Page(HTMLParser):
    """Checks that tags are balanced; keeps the tags, their attributes and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


def test_json_has_the_promised_keys(tmp_path, result, drafter) -> None:
    first, second = drafter("one", [[3, 0], [1, 2, 2]]), drafter("two", [[0], [1]])
    files = write_report(result(first, second), tmp_path / "out")
    values = json.loads(files.json.read_text())
    assert values["acceptance_length"] == {"mean": 2.6, "low": 1.5, "high": 3.0}
    assert values["acceptance_per_position"] == [0.8, 0.6, 0.2]
    assert values["identical_outputs"] is True
    assert values["speedup"] == 1.5
    assert values["num_prompts"] == 2
    assert values["speedup_spread"]["per_batch"] == [1.25, 1.5, 1.75]
    assert values["accepted_lengths"] == {"counts": [1, 1, 2, 1], "shares": [0.2, 0.2, 0.4, 0.2]}
    assert [one["label"] for one in values["speculators"]] == ["one", "two"]
    assert values["speculators"][1]["acceptance_length"]["mean"] == 1.5
    assert values["prompt_lookup"]["acceptance_length"]["mean"] == 1.2
    assert values["speculators"][0]["prompts"][1]["accepted_per_round"] == [1, 2, 2]
    assert values["target"]["repeated_4grams"] == 0.25
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["eval.json", "index.html"]


def test_numbers_that_json_does_not_have_are_null(tmp_path, result, drafter) -> None:
    odd = drafter("one", [[1]], speedup_predicted=float("nan"), identical_outputs=None)
    values = json.loads(write_report(result(odd), tmp_path).json.read_text(), parse_constant=pytest.fail)
    assert values["speedup_predicted"] is None
    assert values["identical_outputs"] is None


def test_page_needs_nothing_but_itself(result) -> None:
    page = Page(render_page(result()))
    for tag, attributes in page.tags:
        assert tag not in ("script", "img", "iframe", "object", "base")
        for name in ("src", "href"):
            assert attributes.get(name, "data:,") == "data:,"
    assert "url(" not in render_page(result())
    assert "@import" not in render_page(result())


def test_page_says_the_headline_numbers(result) -> None:
    page = Page(render_page(result()))
    for text in ("2.60", "1.50×", "✓ Identical", "60 %", "2.500", "25.0 %"):
        assert text in page.text


def test_differing_and_sampled_outputs_are_said(result, drafter) -> None:
    different = drafter("one", [[1], [1]], identical_outputs=False, num_identical=1)
    assert "✗ Different" in Page(render_page(result(different))).text
    sampled = drafter("one", [[1]], identical_outputs=None, num_identical=None)
    assert "Sampled" in Page(render_page(result(sampled))).text


def test_what_models_write_cannot_leave_its_place(tmp_path, result, drafter) -> None:
    nasty = drafter(NASTY, [[3, 0], [1, 2]], text=NASTY, path=None)
    nasty.prompts[0].pieces[:] = [(NASTY, 1, True)]
    object.__setattr__(nasty.prompts[0], "request", NASTY)
    files = write_report(result(nasty, base=NASTY, notes=[NASTY]), tmp_path)
    text = files.page.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "</script><script>alert(1)</script>" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    assert json.loads(files.json.read_text())["base"] == NASTY


def test_accepted_tokens_are_marked(result) -> None:
    page = Page(render_page(result()))
    spans = [attributes for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    assert spans[0] == {"class": "t", "title": "from the prompt's own forward pass"}
    assert spans[1]["class"] == "a"
    assert re.fullmatch(r"round 1: \d draft tokens? accepted", spans[1]["title"])
    assert spans[2]["title"] == "round 1: the target's own token"


def test_curves_of_the_run_are_found_and_drawn(tmp_path, result, drafter) -> None:
    folder = tmp_path / "run" / "global_step_2" / "speculator"
    folder.mkdir(parents=True)
    log = MetricsLog(tmp_path / "run", start_step=0)
    for step in (1, 2):
        log.append(step, {"train/loss": 3.0 / step, "train/acceptance_length": 1.0 + step})
    with_run = write_report(result(drafter("one", [[1]], path=str(folder))), tmp_path / "a").page.read_text()
    assert "<h2>Training</h2>" in with_run
    assert "Training" not in write_report(result(), tmp_path / "b").page.read_text()
    given = write_report(result(), tmp_path / "c", [tmp_path / "run"]).page.read_text()
    assert "<h2>Training</h2>" in given


def test_failed_writing_leaves_the_old_report(tmp_path, result, monkeypatch) -> None:
    write_report(result(), tmp_path)
    before = (tmp_path / "index.html").read_text()
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_report(result(base="another"), tmp_path)
    assert (tmp_path / "index.html").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "index.html"]


def test_best_and_worst_are_ranked_and_apart(result, drafter) -> None:
    rounds = [[1] * 5, [3] * 5, [0] * 5, [2] * 5, [3]]  # the last is too short to rank
    best, worst = best_and_worst(result(drafter("one", rounds)))
    assert [entry.request for entry in best] == ["question 1", "question 3"]
    assert [entry.request for entry in worst] == ["question 2", "question 0"]
    assert best[0].length == "4.00"


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_no_prompt_is_shown_twice(result, drafter, count) -> None:
    best, worst = best_and_worst(result(drafter("one", [[index % 4] * 6 for index in range(count)])))
    shown = [entry.request for entry in best + worst]
    assert len(shown) == len(set(shown)) == min(count, 6)


def test_everything_equal_still_draws(result, drafter) -> None:
    flat = drafter("one", [[0]], acceptance_length=Interval(1.0, 1.0, 1.0), speedup_predicted=None)
    Page(render_page(result(flat, prompt_lookup=flat)))
