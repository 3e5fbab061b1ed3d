from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from tests.support.windows import SCALAR_NAMES, make_window, write_window_file
from verl_speculator.errors import ConfigError, DataError, MissingFileError
from verl_speculator.scorer.spd_dataset import SPDRLHFDataset, window_of

TOKENIZER = SimpleNamespace(pad_token_id=7)


def config(**values):
    return OmegaConf.create({"max_prompt_length": 16, "max_response_length": 4, "padding": "none", **values})


@pytest.fixture
def file(tmp_path):
    windows = [
        make_window([5, 6, 9], drafts=[1, 2, 3], targets=[1, 8, 3, 4], prompt_index=0),
        make_window([5, 6, 9, 1, 8, 7, 7], drafts=[1, 2], targets=[1, 2, 3], prompt_index=0),
        make_window([4], drafts=[7], targets=[3, 4], prompt_index=1),
    ]
    return write_window_file(tmp_path / "windows.parquet", windows)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_drafts_are_found_under_any_padding(file, padding):
    dataset = SPDRLHFDataset(str(file), TOKENIZER, config(padding=padding))

    found = [window_of(dataset[place], SCALAR_NAMES) for place in range(len(dataset))]

    assert [(window.input_ids, window.draft_start_idx, window.drafts) for window in found] == [
        ([5, 6, 9, 1, 2, 3], 3, [1, 2, 3]),
        ([4, 7], 1, [7]),
    ]
    if padding != "none":
        start = int(dataset[0]["draft_start_idx"])
        assert dataset[0]["input_ids"][start : start + 3].tolist() == [1, 2, 3]
        assert len(dataset[0]["input_ids"]) == 20


def test_windows_without_a_mismatch_are_left_out_and_counted(file, capsys):
    dataset = SPDRLHFDataset([str(file)], TOKENIZER, config())

    assert (len(dataset), dataset.num_without_mismatch) == (2, 1)
    assert "1 windows have no mismatch" in capsys.readouterr().out


def test_closed_loop_takes_each_prompt_once(file):
    dataset = SPDRLHFDataset(str(file), TOKENIZER, config(closed_loop=True))

    assert [dataset[place]["raw_prompt"] for place in range(len(dataset))] == [[5, 6, 9], [4]]


def test_scalars_come_in_the_scorers_order(file):
    dataset = SPDRLHFDataset(str(file), TOKENIZER, config())
    wanted = SCALAR_NAMES[2], SCALAR_NAMES[0]

    window = window_of(dataset[0], wanted)

    assert window.scalars == [[row[2], row[0]] for row in dataset[0]["scalars"]]
    with pytest.raises(ConfigError, match="reads 'kl', and the windows of the data have"):
        window_of(dataset[0], ("kl",))


def test_data_without_anything_to_decide_is_refused(tmp_path):
    window = make_window([5], drafts=[1], targets=[1, 2])
    file = write_window_file(tmp_path / "dull.parquet", [window, dataclasses.replace(window, prompt_index=1)])

    with pytest.raises(DataError, match=r"none of the 2 windows of .*dull\.parquet has a mismatch"):
        SPDRLHFDataset(str(file), TOKENIZER, config())


def test_windows_that_are_too_long_and_files_that_are_not_there_are_refused(file, tmp_path):
    with pytest.raises(DataError, match="window of 6 tokens"):
        SPDRLHFDataset(str(file), TOKENIZER, config(max_prompt_length=2, max_response_length=3))
    with pytest.raises(MissingFileError, match="scorer data"):
        SPDRLHFDataset(str(tmp_path / "none.parquet"), TOKENIZER, config())
    with pytest.raises(ConfigError, match=r"data\.padding='both'"):
        SPDRLHFDataset(str(file), TOKENIZER, config(padding="both"))
