"""The report of a load test."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

from verl_speculator.evaluation.load_results import LoadResult
from verl_speculator.reports.load import format_rows, write_load_report

RESULTS = [
    LoadResult("no speculator", 0, 1, 10.0, 20.0, 30.0, 9.0, 11.0, None),
    LoadResult("no speculator", 0, 4, 30.0, 25.0, 70.0, 12.0, 16.0, None),
    LoadResult("<mine>", 3, 1, 18.5, 21.0, 31.0, 5.0, 7.0, 2.345),
    LoadResult("<mine>", 3, 4, 31.0, 26.0, 71.0, 11.0, 15.0, 2.3),
]
SETTINGS = {"base": "BASE", "requests": 64, "max_tokens": 128}


def test_table() -> None:
    lines = [line.split() for line in format_rows(RESULTS).splitlines()]
    assert lines[1] == ["1", "no", "speculator", "10.0", "20.0", "30.0", "9.0", "11.0", "–"]
    assert lines[2] == ["1", "<mine>", "18.5", "21.0", "31.0", "5.0", "7.0", "2.35"]
    assert [line[0] for line in lines[1:]] == ["1", "1", "4", "4"]
    assert len({len(line) for line in format_rows(RESULTS).splitlines()}) == 1


def test_files(tmp_path) -> None:
    write_load_report(RESULTS, SETTINGS, tmp_path)
    written = json.loads((tmp_path / "load.json").read_text())
    assert written["settings"] == SETTINGS
    assert [LoadResult(**one) for one in written["results"]] == RESULTS
    page = (tmp_path / "index.html").read_text()
    assert page.count("<tr>") == 1 + len(RESULTS)
    assert "&lt;mine&gt;" in page
    assert "<mine>" not in page
    charts = [part.partition("</svg>")[0] + "</svg>" for part in page.split("<svg")[1:]]
    assert len(charts) == 2
    for chart in charts:
        ET.fromstring("<svg" + chart)
    for speed in ("10.0", "30.0", "18.5", "31.0"):
        assert speed in charts[0]


def test_a_server_that_someone_else_started_has_no_number_of_drafts(tmp_path) -> None:
    write_load_report([LoadResult("http://there", None, 2, 1.0, 1, 1, 1, 1, 1.5)], SETTINGS, tmp_path)
    assert json.loads((tmp_path / "load.json").read_text())["results"][0]["drafts"] is None
