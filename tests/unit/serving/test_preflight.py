"""What `serve` looks up before vLLM starts."""

import pytest

from verl_speculator.errors import CheckpointError
from verl_speculator.serving import preflight


def test_a_base_with_a_broken_config_ends_in_one_sentence(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not readable JSON"):
        preflight.base_sizes(str(tmp_path))
    (tmp_path / "config.json").write_text('{"text_config": {"hidden_size": 8, "vocab_size": 16}}')
    assert preflight.base_sizes(str(tmp_path)) == (8, 16)
    assert preflight.base_sizes(str(tmp_path / "owner" / "hub-name")) is None
