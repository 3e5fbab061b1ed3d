from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from verl_speculator.base_model.files import BaseSizes, check_base_files, read_base_sizes
from verl_speculator.errors import ConfigError, MissingFileError, SpeculatorError

SIZES = BaseSizes(32, 384, 2, 4, 2, 48, "qwen2", True)


@pytest.fixture
def base_copy(base_model, tmp_path) -> Path:
    return Path(shutil.copytree(base_model, tmp_path / "base"))


def change(file: Path, **values) -> None:
    """Entries of a JSON file; None takes one out."""
    merged = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({name: value for name, value in merged.items() if value is not None}))


def check(base: object, **options) -> BaseSizes | None:
    return check_base_files(str(base), **{"key": "--base", "template_key": "--chat-template FILE", **options})


def refused(base: object, kind: type[SpeculatorError] = ConfigError, **options) -> str:
    with pytest.raises(kind) as error:
        check(base, **options)
    message = str(error.value)
    assert message.startswith(options.get("key", "--base") + ": ")
    assert "\n" not in message
    return message


def test_a_folder_as_it_should_be(base_model) -> None:
    assert check(base_model) == SIZES


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "hdfs://somewhere/model"])
def test_what_is_elsewhere_is_not_looked_at(name) -> None:
    assert check(name) is None


@pytest.mark.parametrize("name", ["absent", "./absent/model", "/absent/model", "../absent", "a/b/c"])
def test_no_such_folder(name) -> None:
    assert f"there is no folder {name!r}" in refused(name, MissingFileError, key="model.path")


def test_sizes_of_the_text_model_and_of_experts(base_copy) -> None:
    file = base_copy / "config.json"
    change(file, num_local_experts=8, num_key_value_heads=None)
    assert check(base_copy) == SIZES._replace(num_key_value_heads=4, intermediate_size=None)
    file.write_text(json.dumps({"text_config": json.loads(file.read_text()), "hidden_size": 7}))
    assert check(base_copy) == SIZES._replace(num_key_value_heads=4, intermediate_size=None)
    change(file, text_config={"hidden_size": 32})
    assert check(base_copy) is None


def test_sizes_alone(base_copy, tmp_path) -> None:
    for file in base_copy.glob("model*"):
        file.unlink()
    assert read_base_sizes(str(base_copy), key="BASE") == SIZES
    assert read_base_sizes(str(tmp_path / "owner" / "name"), key="BASE") is None


@pytest.mark.parametrize(("contents", "what"), [("{", "is not valid JSON"), ("[]", "must hold a JSON object")])
def test_damaged_config(base_copy, contents, what) -> None:
    (base_copy / "config.json").write_text(contents)
    assert what in refused(base_copy)


def test_weights_that_are_not_whole(base_copy) -> None:
    weights = base_copy / "model.safetensors"
    index = base_copy / "model.safetensors.index.json"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "cut short or no safetensors file" in refused(base_copy)
    weights.unlink()
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}))
    assert "model-00001-of-00002.safetensors' is missing" in refused(base_copy, MissingFileError)
    index.unlink()
    assert "has no weights" in refused(base_copy, MissingFileError)
    (base_copy / "pytorch_model.bin").write_bytes(b"anything")
    assert check(base_copy) == SIZES


def test_the_template_may_come_from_elsewhere(base_copy, base_model) -> None:
    for file in base_copy.glob("*chat_template*"):
        file.unlink()
    change(base_copy / "tokenizer_config.json", chat_template=None)
    assert refused(base_copy).endswith("set --chat-template FILE")
    assert check(base_copy, has_template=True) == SIZES
    assert check(base_copy, tokenizer_path=str(base_model)) == SIZES
    assert "the tokenizer in " + repr(str(base_copy)) in refused(base_model, tokenizer_path=str(base_copy))
    change(base_copy / "tokenizer_config.json", chat_template="{{ messages }}")
    assert check(base_copy) == SIZES
