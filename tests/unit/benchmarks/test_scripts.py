"""The benchmarks at toy sizes: they run, and what they write is whole and consistent. No time is asserted."""

from __future__ import annotations

import pytest

LOSS_SIZES = [
    *("--tokens", "64", "--sequence-length", "32", "--vocab", "200", "--hidden", "16", "--width", "24"),
    *("--heads", "2", "--rounds", "2", "--peak-size", "128"),
]
STEP_SIZES = [
    *("--tokens", "64", "--sequence-length", "16", "--vocab", "400", "--hidden", "64", "--layers", "1"),
    *("--intermediate", "64", "--width", "24", "--heads", "2", "--rounds", "2", "--peak-size", "128"),
]


def check_times(rows) -> None:
    """Of two rounds, so the median is half-way between the two."""
    for row in rows:
        check_median(row, "seconds_median", "seconds_min", "seconds_max")
        assert row["seconds_min"] > 0
        assert row["peak_extra_mb"] > 0
        assert row["matmul_peak_fraction"] > 0
        assert row["matmul_peak_gflops"] > 0


def check_median(row, median: str, low: str, high: str) -> None:
    assert row[median] == pytest.approx((row[low] + row[high]) / 2, rel=1e-9)
    assert row[low] < row[high], "the rounds were timed one by one"


def test_loss(run_benchmark) -> None:
    rows = run_benchmark("bench_loss.py", *LOSS_SIZES, "--mask-fractions", "0.5", "1.0")["rows"]
    variants = {row["variant"] for row in rows}
    assert {"stacked", "ours"} <= variants
    assert [row["mask_fraction"] for row in rows] == [0.5] * len(variants) + [1.0] * len(variants)
    check_times(rows)
    for row in rows:
        assert row["tokens"] == 64
        if row["variant"] == "stacked":
            assert row["ratio_min"] == row["ratio_to_stacked"] == row["ratio_max"] == 1
        else:
            check_median(row, "ratio_to_stacked", "ratio_min", "ratio_max")


def test_objectives(run_benchmark) -> None:
    rows = run_benchmark("bench_objectives.py", *LOSS_SIZES, "--mask-fractions", "0.5")["rows"]
    kinds = [(row["objective"], row["weights"]) for row in rows]
    assert kinds == [*((name, "alike") for name in ("ce", "kl", "rkl", "tv", "lk")), ("lk", "adaptive")]
    assert rows[0]["ratio_to_ce"] == 1
    for row in rows:
        assert row["ratio_min"] <= row["ratio_to_ce"] <= row["ratio_max"]
        assert row["peak_extra_mb"] > 0


@pytest.mark.slow
def test_tensor_parallel(run_benchmark) -> None:
    """The script itself compares its variants with torch's cross entropy, and stops where they differ."""
    sizes = ["--tokens", "60", "--mask-fraction", "0.5", "--vocab", "200", "--width", "24", "--heads", "2"]
    report = run_benchmark("bench_tensor_parallel.py", *sizes, "--rounds", "2", "--peak-size", "128")
    assert max(report["float64_difference"].values()) < 1e-10
    rows = {row["variant"]: row for row in report["rows"] if row["micro_batches"] == 1}
    assert {name: row["ranks"] for name, row in rows.items()} == {"rows": 2, "vocabulary": 2, "whole": 1}
    check_times(report["rows"])
    for row in rows.values():
        assert row["trained_rows"] == 60
        assert row["loss"] == pytest.approx(rows["whole"]["loss"], rel=1e-5)
        if row["variant"] != "rows":
            check_median(row, "ratio_to_rows", "ratio_min_to_rows", "ratio_max_to_rows")
    assert rows["rows"]["ratio_to_rows"] == rows["whole"]["ratio_to_whole"] == 1
    # Half of the weight is received and half of its gradient sent; the states' gradient goes both ways.
    assert rows["rows"]["sent_mb"] * 2**20 == 2 * 4 * 200 * 24 / 2
    assert rows["vocabulary"]["sent_mb"] * 2**20 == 2 * 4 * 60 * 24 / 2 + 3 * 4 * 60
    assert rows["whole"]["sent_mb"] == 0
    of_four = {row["variant"]: row for row in report["rows"] if row["micro_batches"] == 4}
    for name, times in (("rows", 1), ("vocabulary", 4)):
        assert of_four[name]["sent_mb"] == times * rows[name]["sent_mb"]
        assert of_four[name]["loss"] == pytest.approx(4 * rows[name]["loss"], rel=1e-5)


@pytest.mark.slow
def test_scaling_of_the_loss(run_benchmark) -> None:
    rows = run_benchmark("bench_scaling.py", *LOSS_SIZES, "--axes", "tokens", "heads", "vocab")["rows"]
    check_times(rows)
    ours = [row for row in rows if row["variant"] == "ours"]
    values = {axis: [row["value"] for row in ours if row["axis"] == axis] for axis in ("tokens", "heads", "vocab")}
    assert values == {"tokens": [32, 64, 128], "heads": [1, 2, 4], "vocab": [50, 200, 800]}
    for row in rows:
        first = next(other for other in rows if (other["axis"], other["variant"]) == (row["axis"], row["variant"]))
        assert row[row["axis"]] == row["value"]
        assert row["seconds_growth"] == pytest.approx(row["seconds_median"] / first["seconds_median"])
        assert row["value_growth"] == row["value"] / first["value"]


@pytest.mark.slow
def test_step(run_benchmark) -> None:
    variants = ["ours", "stacked", "dense_mask", "each", "cached"]
    cut = ["--uneven", "--micro-batch-tokens", "32"]
    report = run_benchmark("bench_step.py", *STEP_SIZES, *cut, "--variants", *variants)
    rows, split = report["rows"], report["split"]
    assert [row["variant"] for row in rows] == variants
    check_times(rows)
    assert all(row["ranks"] == 1 for row in rows)
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds_median"])
        assert report["losses"][row["variant"]] == pytest.approx(report["losses"]["ours"], rel=1e-4)

    cache = report["states_cache"]
    assert cache["bytes_per_token"] == 4 * 64
    saved = sorted(cache["saved_fraction"] * step["seconds_median"] for step in rows if step["variant"] == "ours")
    assert cache["saved_seconds"] == pytest.approx(saved[0])
    assert cache["write_seconds"] > 0

    parts = {part["part"]: part for part in split["parts"]}
    assert list(parts) == ["backbone", "states", "vocabulary", "optimizer", "communication", "rest"]
    assert all(part["seconds_median"] > 0 for part in parts.values())
    assert set(split["rest_parts"]) == {"objective", "batch", "metrics", "other"}
    for step in split["steps"]:
        own = {"backbone", "states", "vocabulary", "optimizer", "clipping", "communication"}
        assert set(step) == own | set(split["rest_parts"])
    assert split["outside_fraction_min"] <= split["outside_fraction"] <= split["outside_fraction_max"] < 1


@pytest.mark.slow
def test_startup(run_benchmark) -> None:
    report = run_benchmark("bench_startup.py", "--rounds", "1", "--cold")
    whole = report["seconds_to_first_step"]["median"]
    rows = {(row["process"], row["activity"]): row for row in report["rows"]}
    assert sum(row["seconds_median"] for row in rows.values()) == pytest.approx(whole)
    assert sum(row["fraction"] for row in rows.values()) == pytest.approx(1)
    assert all(row["seconds_median"] >= 0 for row in rows.values())
    ours = sum(row["seconds_median"] for row in rows.values() if row["is_ours"])
    assert report["ours"]["seconds_median"] == pytest.approx(ours)
    for process in ("command", "torchrun", "trainer"):
        assert {(process, "interpreter"), (process, "torch import")} <= set(rows)
    for activity in ("own imports", "configuration", "checks"):
        assert rows["command", activity]["is_ours"]
        assert rows["trainer", activity]["is_ours"]
    for activity in ("verl import", "engine", "tokenizer and data", "first step"):
        assert rows["trainer", activity]["seconds_median"] > 0
        assert not rows["trainer", activity]["is_ours"]
    assert ("command", "verl import") not in rows, "the checks of the command must not load verl"
