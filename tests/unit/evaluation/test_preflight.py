"""Each mistake in one sentence that names the flag."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl_speculator.errors import CheckpointError, ConfigError, DataError, MissingFileError
from verl_speculator.evaluation import preflight
from verl_speculator.evaluation.preflight import check_input, check_report_folder
from verl_speculator.evaluation.settings import EvaluationInput, EvaluationSettings
from verl_speculator.models import ArcticLSTMSpeculatorConfig, Speculator


def speculator_folder(folder: Path, **changes) -> Path:
    sizes = {"input_hidden_dim": 32, "vocab_size": 384, "n_predict": 2, **changes}
    config = ArcticLSTMSpeculatorConfig(inner_dim="16", emb_dim="16", proj_dim="16", **sizes)
    Speculator.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def given(base_model, chat_data, tmp_path):
    def build(**changes) -> EvaluationInput:
        values = {
            "base": str(base_model),
            "speculators": (str(speculator_folder(tmp_path / "speculator")),),
            "data": (str(chat_data.val),),
        }
        return EvaluationInput(**{**values, **changes})

    return build


def test_everything_in_order(given) -> None:
    check_input(given(), EvaluationSettings(num_draft_tokens=(1, 2)))


def refuse(kind, message, given, **settings) -> None:
    with pytest.raises(kind, match=message) as error:
        check_input(given, EvaluationSettings(**settings))
    assert "\n" not in str(error.value)


def test_paths_that_are_not_there(given, tmp_path) -> None:
    absent = tmp_path / "absent"
    refuse(MissingFileError, "^--speculator: there is no folder", given(speculators=(str(absent),)))
    refuse(MissingFileError, "^--base: there is no folder", given(base=str(absent)))
    refuse(MissingFileError, "^--data: .* does not exist", given(data=(str(absent),)))
    refuse(DataError, "^--data: .*download it first", given(data=("s3://x/y.parquet",)))
    refuse(MissingFileError, "^--chat-template: there is no file", given(chat_template=absent))


def test_folders_without_their_files(given, base_model, tmp_path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(MissingFileError, "^--speculator: .*holds no config.json", given(speculators=(str(empty),)))
    refuse(MissingFileError, "^--base: .*has no config.json", given(base=str(empty)))
    shutil.copy(base_model / "config.json", empty)
    refuse(MissingFileError, "^--base: .*has no weights", given(base=str(empty)))


def test_speculator_without_weights_or_with_a_strange_config(given, tmp_path) -> None:
    folder = speculator_folder(tmp_path / "other")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps({"architectures": ["Nobody"]}))
    refuse(CheckpointError, "^--speculator: .*architectures", given(speculators=(str(folder),)))
    (folder / "config.json").write_text(config)
    for name in ("model.safetensors", "pytorch_model.bin"):
        check_input(given(speculators=(str(folder),)), EvaluationSettings())
        (folder / name).unlink()
    refuse(MissingFileError, "^--speculator: .*holds no weights", given(speculators=(str(folder),)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_hidden_dim": 48}, "trained for hidden size 48 and the base model has 32"),
        ({"vocab_size": 383}, "trained for vocabulary size 383 and the base model has 384"),
    ],
)
def test_speculator_of_another_base(given, tmp_path, changes, message) -> None:
    folder = speculator_folder(tmp_path / "other", **changes)
    refuse(ConfigError, f"^--speculator: .*{message}", given(speculators=(str(folder),)))


def test_more_drafts_than_heads(given) -> None:
    refuse(ConfigError, "^--num-draft-tokens=3 is more than the n_predict=2", given(), num_draft_tokens=(2, 3))


def test_data_without_chats(given, tmp_path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a"]}), file)
    refuse(DataError, "no column 'messages', only text; set --messages-key", given(data=(str(file),)))
    pq.write_table(pa.table({"messages": pa.array([], pa.list_(pa.string()))}), file)
    refuse(DataError, "^--data: .* has no rows", given(data=(str(file),)))
    file.write_text("no parquet")
    refuse(DataError, "not a readable parquet file", given(data=(str(file),)))


def test_base_without_a_chat_template(given, base_model, tmp_path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base_model, copy)
    for file in copy.glob("*chat_template*"):
        file.unlink()
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    refuse(ConfigError, "^--base: .*no chat template.*set --chat-template FILE", given(base=str(copy)))
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    check_input(given(base=str(copy), chat_template=template), EvaluationSettings())


def test_revision_of_a_folder(given) -> None:
    refuse(ConfigError, "^--revision belongs to a name .* leave it out", given(), revision="main")


def test_report_folder_that_cannot_be_made(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^--report: cannot write to"):
        check_report_folder(tmp_path / "file")
    check_report_folder(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one speculator, at `owner/speculator`."""
    import huggingface_hub

    folder = speculator_folder(tmp_path / "hub")

    def download(name: str, file: str, revision: str | None) -> str:
        if name != "owner/speculator":
            raise OSError("404")
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    preflight.speculator_folder.cache_clear()
    yield folder
    preflight.speculator_folder.cache_clear()


def test_a_speculator_may_be_a_name_on_the_hub(hub, given) -> None:
    check_input(given(speculators=("owner/speculator",)), EvaluationSettings(num_draft_tokens=(2,)))
    assert preflight.speculator_folder("owner/speculator") == hub
    refuse(
        ConfigError,
        "--num-draft-tokens=3 .*'owner/speculator'",
        given(speculators=("owner/speculator",)),
        num_draft_tokens=(3,),
    )


def test_a_name_that_the_hub_does_not_have(hub, given) -> None:
    refuse(
        MissingFileError,
        "^--speculator: 'owner/other' is no folder, and the Hugging Face hub has no speculator of that name",
        given(speculators=("owner/other",)),
    )
