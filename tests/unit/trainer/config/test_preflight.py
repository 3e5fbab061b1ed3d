"""Every bad input that can be known before a model is loaded ends in one sentence that names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from verl_speculator.adapters import MLPSpeculatorAdapter
from verl_speculator.checkpoint import layout
from verl_speculator.errors import CheckpointError, ConfigError, DataError, MissingFileError, SpeculatorError
from verl_speculator.trainer.config.compose import load_config
from verl_speculator.trainer.config.preflight import check_run
from verl_speculator.trainer.hidden_states import mark_complete, open_states_cache

ADAPTER_FILE = """
from verl_speculator.adapters import MLPSpeculatorAdapter, SpeculatorAdapter

class MyAdapter(MLPSpeculatorAdapter): ...

class Unfinished(SpeculatorAdapter): ...

class Other: ...
"""


@pytest.fixture
def check(good_run):
    def run(*overrides: str, world_size: int = 2) -> None:
        check_run(load_config([*good_run, *overrides]), world_size)

    return run


@pytest.fixture
def refused(check):
    """The one sentence with which a run is refused."""

    def run(*overrides: str, error: type[SpeculatorError] = ConfigError, world_size: int = 2) -> str:
        with pytest.raises(error) as caught:
            check(*overrides, world_size=world_size)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return run


def test_good_run_passes(check, tmp_path) -> None:
    check()
    assert not list((tmp_path / "checkpoints").iterdir()), "a check must leave nothing behind"
    check("engine.ulysses_sequence_parallel_size=2", world_size=4)
    check("model.freeze_base_model=false", "model.speculator.method=sum_lstm", "optim.lr=1")
    check("trainer.save_freq=after_each_epoch", "data.val_files=null")


@pytest.mark.parametrize("value", [0, -1, 1.5, "true", "x"])
def test_n_predict(refused, value) -> None:
    message = refused(f"model.speculator.n_predict={value}")
    assert "model.speculator.n_predict must be a positive integer" in message


@pytest.mark.parametrize("name", ["inner_dim", "emb_dim", "proj_dim"])
@pytest.mark.parametrize("value", ["1024.x", '""', "", "0", "16.", "16.-1", "1e3", "null"])
def test_widths(refused, name, value) -> None:
    message = refused(f"model.speculator.{name}={value}")
    assert f"model.speculator.{name} must be" in message
    assert '"1024.2048"' in message


def test_method(refused) -> None:
    message = refused("model.speculator.method=sum_gru")
    assert "model.speculator.method must be 'sum_rnn' or 'sum_lstm', not 'sum_gru'" in message


def test_sum_lstm_must_be_tied(refused) -> None:
    message = refused("model.speculator.method=sum_lstm", "model.speculator.tie_weights=false")
    assert "model.speculator.tie_weights must be true" in message


def test_unknown_setting_of_the_speculator(refused) -> None:
    message = refused("+model.speculator.n_predcit=3")
    assert message == (
        "model.speculator.n_predcit is not a setting of this speculator; did you mean model.speculator.n_predict?"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module.Adapter", "cannot be imported"),
        ("verl_speculator.adapters.NoSuchAdapter", "has no 'NoSuchAdapter'"),
        ("torch.nn.Linear", "is no adapter"),
        ("{fqn: math.pi}", "is no adapter"),
        ("LSTMSpeculatorAdapter", "must be a full dotted name"),
        ("{path: missing.py, name: MyAdapter}", "there is no file 'missing.py'"),
        ("{path: PATH, name: Missing}", "has no class 'Missing'"),
        ("{path: PATH, name: Other}", "is no adapter"),
        ("{path: PATH, name: Unfinished}", "must define build_speculator_module, compute_speculator_logits"),
        ("{path: PATH}", "must be a dotted name, {fqn: dotted.name} or {path: file.py, name: Class}"),
        ("null", "must be a dotted name"),
    ],
)
def test_adapter(refused, tmp_path, name, reason) -> None:
    path = tmp_path / "my_adapter.py"
    path.write_text(ADAPTER_FILE)
    message = refused(f"model.speculator_adapter={name.replace('PATH', str(path))}")
    assert message.startswith("model.speculator_adapter")
    assert reason in message


def test_adapter_in_a_file(check, tmp_path) -> None:
    path = tmp_path / "my_adapter.py"
    path.write_text(ADAPTER_FILE)
    check(f"model.speculator_adapter={{path: {path}, name: MyAdapter}}")


@pytest.mark.parametrize("key", ["data.train_files", "data.val_files"])
def test_missing_data(refused, key, tmp_path) -> None:
    file = tmp_path / "absent.parquet"
    assert f"{key}: {str(file)!r} does not exist" in refused(f"{key}={file}", error=MissingFileError)
    assert f"{key}: {str(tmp_path)!r} is a folder" in refused(f"{key}={tmp_path}", error=MissingFileError)


@pytest.mark.parametrize("key", ["data.train_files", "data.val_files"])
@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ({"messages": []}, "has no rows"),
        ({"prompt": ["a"], "answer": ["b"]}, "has no column 'messages', only prompt, answer"),
        ({"messages": ["text"]}, "must hold lists of {role, content} messages"),
        ({"messages": [[{"from": "user", "value": "x"}]]}, "must hold lists of {role, content} messages"),
        ({"messages": [[]]}, "must hold lists of {role, content} messages"),
        (b"", "is not a readable parquet file"),
        (b"messages\nhello\n", "is not a readable parquet file"),
    ],
)
def test_bad_data(refused, key, contents, reason, tmp_path) -> None:
    file = tmp_path / "bad.parquet"
    if isinstance(contents, bytes):
        file.write_bytes(contents)
    else:
        pq.write_table(pa.table(contents), file)
    message = refused(f"{key}={file}", error=DataError)
    assert message.startswith(f"{key}: ")
    assert str(file) in message
    assert reason in message


def test_truncated_data(refused, chat_data, tmp_path) -> None:
    file = tmp_path / "cut.parquet"
    file.write_bytes(chat_data.train.read_bytes()[:-100])
    assert "is not a readable parquet file" in refused(f"data.train_files={file}", error=DataError)


@pytest.mark.parametrize("value", ["[]", "null", '""', "3", "[a.parquet,null]"])
def test_data_must_be_files(refused, value) -> None:
    message = refused(f"data.train_files={value}")
    assert message.startswith("data.train_files must be a parquet file or a list of them, got ")


def test_second_file_of_a_list_is_checked(refused, chat_data, tmp_path) -> None:
    files = f"data.train_files=[{chat_data.train},{tmp_path / 'absent.parquet'}]"
    assert "absent.parquet" in refused(files, error=MissingFileError)


def test_fewer_rows_than_a_batch(refused, check) -> None:
    assert "is more than the 64 rows of data.train_files" in refused("data.train_batch_size=128")
    assert "is more than the 16 rows" in refused("data.train_max_samples=16")


def test_own_dataset_class_reads_what_it_likes(check, refused, tmp_path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("{}\n")
    check(f"data.train_files={file}", "data.custom_cls.path=own.py", "data.custom_cls.name=Own", "data.val_files=null")
    custom = ["data.custom_cls.path=own.py", "data.val_files=null"]
    assert "does not exist" in refused("data.train_files=absent.jsonl", *custom, error=MissingFileError)


@pytest.fixture
def base_copy(base_model, tmp_path) -> Path:
    return Path(shutil.copytree(base_model, tmp_path / "base"))


@pytest.mark.parametrize("name", ["/absent/model", "./absent", "absent", "a/b/c", '""', "null"])
def test_base_model_that_is_not_there(refused, name) -> None:
    assert refused(f"model.partial_pretrain={name}", error=SpeculatorError).startswith("model.path")


def test_base_model_names_that_only_others_can_resolve(check) -> None:
    check("model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct")
    check("model.partial_pretrain=hdfs://cluster/models/base")


def test_base_model_without_weights(refused, base_copy) -> None:
    (base_copy / "model.safetensors").unlink()
    # A LoRA adapter's weights are not the model's.
    (base_copy / "adapter_model.safetensors").touch()
    message = refused(f"model.partial_pretrain={base_copy}", error=MissingFileError)
    assert message.startswith(f"model.path: {str(base_copy)!r} has no weights")
    assert "model.safetensors" in message


def test_base_model_in_parts(refused, check, base_copy) -> None:
    (base_copy / "model.safetensors").rename(base_copy / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (base_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    check(f"model.partial_pretrain={base_copy}")
    (base_copy / "model-00001-of-00001.safetensors").unlink()
    message = refused(f"model.partial_pretrain={base_copy}", error=MissingFileError)
    assert "model-00001-of-00001.safetensors' is missing" in message


def test_base_model_cut_short(refused, base_copy) -> None:
    weights = base_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "model.safetensors' is cut short" in refused(f"model.partial_pretrain={base_copy}")


def test_base_model_config(refused, base_copy) -> None:
    (base_copy / "config.json").write_text("{")
    assert "config.json' is not valid JSON" in refused(f"model.partial_pretrain={base_copy}")
    (base_copy / "config.json").unlink()
    assert "has no config.json" in refused(f"model.partial_pretrain={base_copy}", error=MissingFileError)


def test_base_model_without_chat_template(refused, check, base_copy) -> None:
    (base_copy / "chat_template.jinja").unlink()
    assert "has no chat template" in refused(f"model.partial_pretrain={base_copy}")
    check(f"model.partial_pretrain={base_copy}", "model.custom_chat_template=x")


def test_speculator_to_start_from(check, refused, write_speculator, tmp_path) -> None:
    check(f"model.speculator_path={write_speculator(tmp_path / 'speculator')}")
    check(f"model.speculator_path={write_speculator(tmp_path / 'global_step_3' / 'speculator').parent}")
    message = refused(f"model.speculator_path={tmp_path / 'absent'}", error=MissingFileError)
    assert message.startswith("model.speculator_path: ")
    assert "absent" in message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": 400}, "was trained for vocabulary size 400 and the base model has 384"),
        ({"input_hidden_dim": 64}, "was trained for hidden size 64 and the base model has 32"),
    ],
)
def test_speculator_of_another_base_model(refused, write_speculator, tmp_path, changes, reason) -> None:
    folder = write_speculator(tmp_path / "speculator", **changes)
    message = refused(f"model.speculator_path={folder}")
    assert message.startswith("model.speculator_path: ")
    assert reason in message


def test_speculator_of_another_type(refused, write_speculator, tmp_path) -> None:
    folder = write_speculator(tmp_path / "speculator")
    name = f"{MLPSpeculatorAdapter.__module__}.MLPSpeculatorAdapter"
    message = refused(f"model.speculator_path={folder}", f"model.speculator_adapter={name}", error=CheckpointError)
    assert "is a ArcticLSTMSpeculator, not a MLPSpeculator" in message


@pytest.mark.parametrize("damage", ["truncate", "garbage", "config", "no_weights", "lacking"])
def test_damaged_speculator(refused, write_speculator, tmp_path, damage) -> None:
    folder = write_speculator(tmp_path / "speculator")
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "garbage":
        weights.write_bytes(b"\x00" * 64)
    elif damage == "config":
        config.write_text(config.read_text()[:20])
    elif damage == "no_weights":
        weights.unlink()
        (folder / "pytorch_model.bin").unlink()
    else:
        config.write_text(config.read_text().replace('"n_predict": 2', '"n_predict": 4'))
    error = MissingFileError if damage == "no_weights" else CheckpointError
    message = refused(f"model.speculator_path={folder}", error=error)
    assert message.startswith("model.speculator_path: ")
    assert str(folder) in message


@pytest.fixture
def checkpoint(write_speculator, tmp_path) -> Path:
    """A complete one in the folder to which the run saves."""
    root = tmp_path / "checkpoints"
    staging = layout.open_staging(root, 4)
    write_speculator(staging / "speculator")
    (staging / "resume" / "optimizer").mkdir(parents=True)
    (staging / "resume" / "optimizer" / "__0_0.distcp").write_bytes(b"optimizer" * 100)
    return layout.commit(root, 4)


def test_resumes_from_a_whole_checkpoint(check, checkpoint) -> None:
    check()
    check("trainer.resume_mode=resume_path", f"trainer.resume_from_path={checkpoint}")


def test_resuming_with_another_shape(refused, check, checkpoint, good_run, write_speculator, tmp_path) -> None:
    OmegaConf.save(load_config([*good_run, "model.speculator.n_predict=2"]), checkpoint / layout.RUN_CONFIG_FILE)
    same = ["model.speculator.n_predict=2", "model.speculator.inner_dim='16'"]
    check(*same)
    message = refused(*same, "model.speculator.method=sum_lstm")
    assert message.startswith(f"model.speculator.method=sum_lstm, but {checkpoint} was trained with sum_rnn: ")
    check("model.speculator.n_predict=3", "trainer.resume_mode=disable")
    loaded = f"model.speculator_path={write_speculator(tmp_path / 'other')}"
    assert refused(*same, loaded).startswith(loaded)
    OmegaConf.save(load_config([*good_run, loaded]), checkpoint / layout.RUN_CONFIG_FILE)
    check(loaded)
    # Its shape is that of the loaded one, but not all of its settings are about a shape.
    assert refused("model.speculator.n_predict=3", loaded).startswith("model.speculator.n_predict=3, but ")


@pytest.mark.parametrize("way", ["auto", "resume_path"])
@pytest.mark.parametrize("file", ["speculator/model.safetensors", "resume/optimizer/__0_0.distcp"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_damaged_checkpoint(refused, check, checkpoint, way, file, damage) -> None:
    path = checkpoint / file
    contents = path.read_bytes()
    if damage == "cut":
        path.write_bytes(contents[: len(contents) // 2])
    elif damage == "changed":
        path.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    else:
        path.unlink()
    overrides = [f"trainer.resume_mode={way}"]
    overrides += [f"trainer.resume_from_path={checkpoint}"] if way == "resume_path" else []
    message = refused(*overrides, error=CheckpointError)
    assert str(path) in message
    assert f"remove {checkpoint}" in message
    check("trainer.resume_mode=disable")


def test_checkpoint_of_another_base_model(refused, checkpoint, tmp_path, base_copy) -> None:
    config = json.loads((base_copy / "config.json").read_text())
    (base_copy / "config.json").write_text(json.dumps({**config, "vocab_size": 500}))
    message = refused(f"model.partial_pretrain={base_copy}")
    assert "was trained for vocabulary size 384 and the base model has 500" in message


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["trainer.resume_mode=maybe"], "trainer.resume_mode must be auto, disable or resume_path, got 'maybe'"),
        (["trainer.resume_mode=resume_path"], "needs trainer.resume_from_path"),
        (["trainer.resume_from_path=/x/step_3"], "trainer.resume_from_path must be a global_step_N folder"),
        (["trainer.resume_from_path=/absent/global_step_3"], "there is no folder '/absent/global_step_3'"),
    ],
)
def test_resume_settings(refused, overrides, reason) -> None:
    assert reason in refused(*overrides, error=SpeculatorError)


def test_resume_from_what_is_no_checkpoint(refused, tmp_path) -> None:
    (tmp_path / "global_step_3").mkdir()
    message = refused(f"trainer.resume_from_path={tmp_path / 'global_step_3'}", error=CheckpointError)
    assert "is no complete checkpoint" in message


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_save_path_not_writable(refused, tmp_path, place) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / place
    message = refused(f"trainer.default_local_dir={folder}")
    assert message.startswith(f"trainer.default_local_dir: cannot write to {str(folder)!r}")


@pytest.mark.parametrize(
    ("override", "right"),
    [
        ("data.train_batch_size=0", "a positive integer"),
        ("data.micro_batch_size_per_gpu=x", "a positive integer"),
        ("data.max_length=1.5", "a positive integer"),
        ("data.num_workers=-1", "0 or a positive integer"),
        ("engine.ulysses_sequence_parallel_size=0", "a positive integer"),
        ("optim.lr=0", "a positive number"),
        ("optim.lr=fast", "a positive number"),
        ("optim.clip_grad=null", "a positive number"),
        ("optim.base_lr=0", "null or a positive number"),
        ("model.speculator_loss_coeff=-1", "0 or a positive number"),
        ("model.freeze_base_model=1", "true or false"),
        ("model.gather_speculator_once=sometimes", "true or false"),
        ("model.attend_by_sequence=1", "true or false"),
        ("trainer.total_epochs=0", "a positive integer"),
        ("trainer.total_training_steps=0", "null or a positive integer"),
        ("trainer.save_freq=often", "an integer or after_each_epoch"),
        ("trainer.default_local_dir=null", "a path"),
        ("model.speculator_path=3", "null or a path"),
        ("engine.strategy=ddp", "fsdp2 or fsdp"),
        ("engine.forward_only=true", "false"),
        ("+engine.mixed_precision.param_dtype=fp16", "bf16 or fp32"),
        ("data.pad_mode=right", "no_padding"),
        ("data.truncation=left", "right or error"),
        ("trainer.default_hdfs_dir=hdfs://cluster/run", "null"),
        ("model.use_fused_kernels=true", "false"),
        ("model.lora_rank=8", "0"),
        ("model.speculator_dtype=fp16", "null, bf16 or fp32"),
    ],
)
def test_values(refused, override, right) -> None:
    key = override.lstrip("+").partition("=")[0]
    assert refused(override).startswith(f"{key} must be {right}")


def test_a_frozen_base_has_no_learning_rate(refused, check) -> None:
    assert refused("optim.base_lr=1e-5").startswith("optim.base_lr has no meaning while model.freeze_base_model=true")
    check("optim.base_lr=1e-5", "model.freeze_base_model=false")


def test_batches_and_processes(refused, check) -> None:
    assert "must be divisible by the 3 data-parallel ranks" in refused(world_size=3)
    fixed = ["data.use_dynamic_bsz=false", "data.micro_batch_size_per_gpu=3"]
    assert "gives 16 rows a rank, which data.micro_batch_size_per_gpu=3 must divide" in refused(*fixed)
    assert "must not exceed data.max_token_len_per_gpu=64" in refused("data.max_token_len_per_gpu=64")
    check("data.max_token_len_per_gpu=64", "data.use_dynamic_bsz=false")
    ulysses = "engine.ulysses_sequence_parallel_size=2"
    assert "must divide the 3 processes" in refused(ulysses, world_size=3)
    assert "needs model.use_remove_padding=true" in refused(ulysses, "model.use_remove_padding=false")


def test_weights_can_be_left_unread(good_run, checkpoint) -> None:
    (checkpoint / "speculator" / "model.safetensors").write_bytes(b"")
    check_run(load_config(good_run), 2, read_weights=False)


@pytest.mark.parametrize("key", ["val_only", "val_before_train"])
def test_validation_needs_data(refused, check, key) -> None:
    check(f"trainer.{key}=true")
    assert refused(f"trainer.{key}=true", "data.val_files=null") == f"trainer.{key}=true needs data.val_files"


def test_hidden_states_of_something_else_are_refused(check, refused, good_run, tmp_path, chat_data) -> None:
    """What is known before a device is: the base, the data, and what decides on the tokens of a row."""
    folder = tmp_path / "states"
    cache = f"data.hidden_states_cache={folder}"
    check(cache)
    assert not folder.exists(), "a check must leave nothing behind"
    config = load_config([*good_run, cache, "+engine.mixed_precision={param_dtype: bf16}"])
    settings = open_states_cache(config, revision=None)
    assert (settings.dtype, settings.is_complete, settings.max_bytes) == ("bfloat16", False, None)
    check(cache)
    check(cache, "optim.lr=1", "data.train_batch_size=4", "model.speculator.n_predict=2", "data.val_files=null")
    head = f"data.hidden_states_cache: {str(folder)!r} has the hidden states of "
    assert refused(cache, "data.max_length=77").startswith(f"{head}data.max_length=1024, and this run has 77: give")
    message = refused(cache, f"data.train_files={chat_data.val}", "data.train_batch_size=2")
    assert message.startswith(f"{head}data.train_files={chat_data.train}, and this run has {chat_data.val}")
    assert "data.hidden_states_dtype=bfloat16, and this run has float32" in refused(
        cache, "data.hidden_states_dtype=fp32"
    )

    mark_complete(config)
    assert open_states_cache(config, revision=None).is_complete
    without = load_config([*good_run, cache, "+engine.mixed_precision={param_dtype: bf16}", "data.val_files=null"])
    assert not open_states_cache(without, revision=None).is_complete
    (folder / "cache.json").write_text("{")
    assert "cache.json cannot be read" in refused(cache, error=CheckpointError)
    assert "is not empty and has no cache.json" in refused(f"data.hidden_states_cache={chat_data.train.parent}")


def test_how_the_speculator_is_cut(check, refused) -> None:
    check("model.speculator_shard_size=2", world_size=4)
    assert "model.speculator_shard_size=3 must divide the 4 processes" in refused(
        "model.speculator_shard_size=3", world_size=4
    )
    check("engine.reshard_after_forward=auto")
    assert "must be true, false or auto, got 'never'" in refused("engine.reshard_after_forward=never")


def test_an_early_stop_needs_validation(refused) -> None:
    assert "needs data.val_files" in refused("trainer.early_stop_patience=2", "data.val_files=null")
    assert "must be null or a positive integer" in refused("trainer.early_stop_patience=0")


def test_hidden_states_are_kept_of_a_frozen_base_on_fsdp(refused, tmp_path) -> None:
    cache = f"data.hidden_states_cache={tmp_path / 'states'}"
    assert "needs model.freeze_base_model=true" in refused(cache, "model.freeze_base_model=false")
    assert "with engine=fsdp" in refused(cache, "engine=megatron", "optim=megatron")
    assert "data.hidden_states_cache_gb must be null or a positive" in refused(cache, "data.hidden_states_cache_gb=0")
