from __future__ import annotations

import pytest

from verl_speculator.reports.table import format_table


def test_numbers_stand_in_their_rows(result) -> None:
    lines = format_table(result(), 200).splitlines()
    cells = {line[:25].strip(): line[25:].split() for line in lines}
    # 8 of 15 drafted tokens in 5 rounds: 1 + 8 / 5; at least one accepted in 4 of 5 rounds, two in 3, three in 1.
    assert cells["acceptance length"][:4] == ["2.60", "(1.50", "to", "3.00)"]
    assert cells["accepted up to token 1"][:2] == ["80.0", "%"]
    assert cells["accepted up to token 2"][:2] == ["60.0", "%"]
    assert cells["accepted up to token 3"][:2] == ["20.0", "%"]
    assert cells["speed-up, measured"][0] == "1.50×"
    assert cells["target forwards saved"][:2] == ["60.0", "%"]
    assert "2.500 nats a token" in lines[-1]
    assert "25.0 % of the 4-grams" in lines[-1]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 132])
def test_fits_the_terminal(result, drafter, width) -> None:
    several = [drafter("a/rather/long/name/of/a/folder" * (i + 1), [[3, 0], [1, 2]]) for i in range(4)]
    lines = format_table(result(*several), width).splitlines()
    assert max(map(len, lines)) <= width
    assert sum("acceptance length" in line or line.startswith("acceptanc") for line in lines) >= 1


def test_wide_terminal_has_one_block(result, drafter) -> None:
    text = format_table(result(drafter("one", [[3]]), drafter("two", [[0]])), 160)
    assert text.count("acceptance length") == 1
    head = text.splitlines()[0]
    assert head.index("one") < head.index("two") < head.index("prompt lookup")


def test_sampled_outputs_are_not_called_identical(result, drafter) -> None:
    text = format_table(result(drafter("one", [[1]], identical_outputs=None, num_identical=None)), 100)
    assert "not compared (sampled)" in text
