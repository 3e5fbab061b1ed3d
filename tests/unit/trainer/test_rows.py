"""Which dataset a run reads."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

from tests.support.tiny import tiny_tokenizer
from verl_speculator.data.token_rows import tokenizer_fingerprint
from verl_speculator.data.training_rows import TrainingRows
from verl_speculator.errors import ConfigError
from verl_speculator.trainer.config.compose import load_config
from verl_speculator.trainer.rows import build_rows

OWN_DATASET = """
class Own:
    def __init__(self, parquet_files, **others):
        self.files = parquet_files
"""


@pytest.fixture
def build(good_run):
    def run(*overrides: str, processor=None):
        data = load_config([*good_run, *overrides]).data
        return build_rows(data, "train_files", data.train_max_samples, tiny_tokenizer(), processor)

    return run


@pytest.fixture
def tokens(tmp_path) -> str:
    row = {"input_ids": [[1, 2]], "loss_mask": [[0, 1]], "tokenizer": [tokenizer_fingerprint(tiny_tokenizer())]}
    pq.write_table(pa.table(row), tmp_path / "tokens.parquet")
    return f"data.train_files={tmp_path / 'tokens.parquet'}"


def test_ours_reads_chats_and_tokens(build, tokens, chat_data):
    rows = build()
    assert isinstance(rows, TrainingRows)
    assert len(rows) == 64
    assert len(build("data.train_max_samples=5")) == 5
    assert len(build("data.max_length=4")[0]["input_ids"]) == 4
    mixed = build(f"data.train_files=[{chat_data.val},{tokens.partition('=')[2]}]")
    assert mixed[len(mixed) - 1]["input_ids"].tolist() == [1, 2]


def test_verls_reads_where_it_is_needed(build, tokens, tmp_path):
    assert isinstance(build("data.ignore_input_ids_mismatch=true"), MultiTurnSFTDataset)
    (tmp_path / "own.py").write_text(OWN_DATASET)
    own = build(tokens, f"data.custom_cls.path={tmp_path / 'own.py'}", "data.custom_cls.name=Own")
    assert own.files == [tokens.partition("=")[2]]
    with pytest.raises(ConfigError, match=r"^data\.train_files: .* holds tokens, but data\.ignore_input_ids_mismatch"):
        build(tokens, "data.ignore_input_ids_mismatch=true")
    with pytest.raises(ConfigError, match=r"^data\.train_files: .* holds tokens, but the base also reads images"):
        build(tokens, processor=object())


def test_settings_of_the_template_reach_it(build, tmp_path, monkeypatch):
    seen = []

    def note(files, tokenizer, settings):
        seen.append(settings)

    monkeypatch.setattr("verl_speculator.trainer.rows.TrainingRows", note)
    build()
    build("data.enable_thinking_default=false", "+data.apply_chat_template_kwargs.a=1", "data.messages_key=chat")
    # verl writes `none` where it means null.
    assert (seen[0].enable_thinking_default, seen[0].messages_key) == (None, "messages")
    assert (seen[1].enable_thinking_default, seen[1].messages_key) == (False, "chat")
    assert seen[1].apply_chat_template_kwargs == {"a": 1}
