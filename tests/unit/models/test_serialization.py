"""Speculator folders: what is written, what is accepted, and which sentence a broken one ends in."""

import json
import re
from dataclasses import dataclass

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from verl_speculator.errors import CheckpointError, MissingFileError
from verl_speculator.evaluation.preflight import read_speculator_configs
from verl_speculator.evaluation.settings import EvaluationInput, EvaluationSettings
from verl_speculator.models import (
    ArcticLSTMSpeculator,
    MLPSpeculator,
    MLPSpeculatorConfig,
    Speculator,
    register_speculator,
)

CONFIG = MLPSpeculatorConfig(input_hidden_dim=18, vocab_size=37, n_predict=3, inner_dim=24)


@pytest.fixture
def saved(tmp_path):
    """A saved tied MLP speculator's folder."""
    Speculator.from_config(CONFIG).save_pretrained(tmp_path / "speculator")
    return tmp_path / "speculator"


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def assert_same_weights(first, second):
    one, other = dict(first.named_parameters()), dict(second.named_parameters())
    assert one.keys() == other.keys()
    for name, parameter in one.items():
        assert torch.equal(parameter, other[name]), name
        assert other[name].requires_grad


@pytest.mark.parametrize("source", ["model.safetensors", "pytorch_model.bin"])
def test_round_trip(any_config, make_speculator, tmp_path, source):
    speculator = make_speculator(any_config)
    speculator.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors", "pytorch_model.bin"]
    for name in {"model.safetensors", "pytorch_model.bin"} - {source}:
        (tmp_path / name).unlink()
    loaded = Speculator.from_pretrained(tmp_path)
    assert loaded.config == any_config
    assert_same_weights(speculator, loaded)


@pytest.fixture
def sharded(saved):
    """The folder as huggingface_hub writes it when a file would be too large."""
    tensors = load_file(saved / "model.safetensors")
    for name in ("model.safetensors", "pytorch_model.bin"):
        (saved / name).unlink()
    save_torch_state_dict(tensors, saved, max_shard_size=max(tensor.nbytes for tensor in tensors.values()))
    assert len(list(saved.glob("model-*-of-*.safetensors"))) > 1
    return saved, tensors


def test_sharded_weights(sharded):
    folder, tensors = sharded
    loaded = Speculator.from_pretrained(folder).export_state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_sharded_weights_can_be_evaluated(sharded):
    folder, _ = sharded
    given = EvaluationInput("base", (folder,), ()), EvaluationSettings(), None
    assert read_speculator_configs(*given) == [CONFIG]
    next(folder.glob("*.index.json")).unlink()
    with pytest.raises(MissingFileError, match="holds no weights"):
        read_speculator_configs(*given)


def test_broken_shards(sharded):
    folder, _ = sharded
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    weight_map = values["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"head.9.weight": weight_map["head.0.weight"]}}))
    with pytest.raises(CheckpointError, match=r"names tensors that its files lack: head\.9\.weight"):
        Speculator.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": weight_map | {"head.0.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(MissingFileError, match="elsewhere"):
        Speculator.from_pretrained(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        Speculator.from_pretrained(folder)
    index.write_text(json.dumps(values))
    next(folder.glob("model-*-of-*.safetensors")).unlink()
    with pytest.raises(MissingFileError, match="which is not beside it"):
        Speculator.from_pretrained(folder)


def test_tied_copies_are_written_out(saved):
    names = {f"{kind}.{i}.weight" for kind in ("emb", "proj", "ln", "head") for i in range(3)}
    names |= {f"ln.{i}.bias" for i in range(3)}
    for tensors in (load_file(saved / "model.safetensors"), torch.load(saved / "pytorch_model.bin", weights_only=True)):
        assert tensors.keys() == names
        assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(names)


def test_files_are_readable_like_any_other(saved):
    modes = {file.stat().st_mode for file in saved.iterdir()}
    assert modes == {(saved / "config.json").stat().st_mode}


def test_saving_over_an_older_one_while_it_is_in_use(saved):
    first = Speculator.from_pretrained(saved)
    before = first.head_weight(0).clone()
    Speculator.from_config(CONFIG).save_pretrained(saved)
    assert torch.equal(first.head_weight(0), before)
    assert not torch.equal(Speculator.from_pretrained(saved).head_weight(0), before)


def test_a_failed_write_leaves_the_old_files(saved, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("verl_speculator.models.serialization.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        Speculator.from_config(CONFIG).save_pretrained(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_gathered_tensors_can_be_saved_for_a_sharded_module(tmp_path):
    speculator = Speculator.from_config(CONFIG)
    with torch.device("meta"):
        without_data = MLPSpeculator(CONFIG)
    with pytest.raises(CheckpointError, match=r"not whole tensors with data: emb\.0\.weight"):
        without_data.save_pretrained(tmp_path)
    without_data.save_pretrained(tmp_path, state_dict=speculator.state_dict())
    assert_same_weights(speculator, Speculator.from_pretrained(tmp_path))


def test_folder_that_contains_a_speculator_folder(saved):
    assert_same_weights(Speculator.from_pretrained(saved), Speculator.from_pretrained(str(saved.parent)))


def test_dtype(saved):
    assert Speculator.from_pretrained(saved).head_weight(0).dtype == torch.float32
    assert {p.dtype for p in Speculator.from_pretrained(saved, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@dataclass(kw_only=True)
class MappedConfig(MLPSpeculatorConfig):
    architectures = ("MappedSpeculator",)


@register_speculator(MappedConfig)
class MappedSpeculator(MLPSpeculator):
    """Has a table of token ids, as speculators with a vocabulary of their own do."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("d2t", torch.arange(2**40, 2**40 + 37))


def test_dtype_is_that_of_floating_point_tensors_only(tmp_path):
    MappedSpeculator(MappedConfig(input_hidden_dim=18, vocab_size=37, inner_dim=24)).save_pretrained(tmp_path)
    loaded = Speculator.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.d2t, torch.arange(2**40, 2**40 + 37))


def test_subclass_checks_the_kind(saved):
    assert type(MLPSpeculator.from_pretrained(saved)) is MLPSpeculator
    with pytest.raises(CheckpointError, match=r"config\.json .* MLPSpeculator, not a ArcticLSTMSpeculator"):
        ArcticLSTMSpeculator.from_pretrained(saved)


def test_prefix_is_stripped(saved):
    expected = Speculator.from_pretrained(saved)

    def prefix(tensors):
        for name in list(tensors):
            tensors[f"speculator.{name}"] = tensors.pop(name)

    rewrite(saved, prefix)
    assert_same_weights(expected, Speculator.from_pretrained(saved))


def test_shared_tensors_alone_are_enough(saved):
    expected = Speculator.from_pretrained(saved)

    def keep_shared(tensors):
        for name in list(tensors):
            if name not in expected.state_dict():
                del tensors[name]

    rewrite(saved, keep_shared)
    assert_same_weights(expected, Speculator.from_pretrained(saved))


def test_a_file_that_does_not_say_whether_weights_are_tied_has_them_untied(saved):
    values = json.loads((saved / "config.json").read_text())
    del values["tie_weights"]
    (saved / "config.json").write_text(json.dumps(values))
    assert len(list(Speculator.from_pretrained(saved).head)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("emb.0.weight"), "lacks tensors: emb.0.weight"),
        (lambda t: t.pop("head.2.weight"), "lacks tensors: head.2.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "has unexpected tensors: extra"),
        (
            lambda t: t.update({f"x{i}": torch.zeros(1) for i in range(7)}),
            "unexpected tensors: x0, x1, x2, x3, x4 and 2 more",
        ),
        (
            lambda t: t.update({"proj.0.weight": torch.zeros(24, 19)}),
            r"do not fit its config.json: proj.0.weight \[24, 19\] instead of \[24, 18\]",
        ),
        (lambda t: t["head.1.weight"].add_(1), "tied copies that differ .*: head.1.weight and head.0.weight"),
    ],
)
def test_wrong_tensors(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(saved / 'model.safetensors'))} .*{message}"):
        Speculator.from_pretrained(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\x00" * 999])
def test_damaged_weights(saved, name, damage):
    if name == "pytorch_model.bin":
        (saved / "model.safetensors").unlink()
    file = saved / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=re.escape(str(file))):
        Speculator.from_pretrained(saved)


def test_pickled_objects_are_not_loaded(saved):
    (saved / "model.safetensors").unlink()
    file = saved / "pytorch_model.bin"
    for contents in ({"emb.0.weight": 1}, [torch.zeros(1)], CONFIG):
        torch.save(contents, file)
        with pytest.raises(CheckpointError, match=re.escape(str(file))):
            Speculator.from_pretrained(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '{"architectures": ["LlamaForCausalLM"]}'])
def test_broken_config(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(str(saved / "config.json"))):
        Speculator.from_pretrained(saved)


def test_wrong_value_in_a_config_file(saved):
    values = json.loads((saved / "config.json").read_text()) | {"n_predict": -1}
    (saved / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json is not usable: n_predict must be a positive integer"):
        Speculator.from_pretrained(saved)


def test_missing_files(saved, tmp_path):
    with pytest.raises(MissingFileError, match="nowhere is not a folder"):
        Speculator.from_pretrained(tmp_path / "nowhere")
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").unlink()
    with pytest.raises(MissingFileError, match="holds no weights"):
        Speculator.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(MissingFileError, match=r"holds no config\.json"):
        Speculator.from_pretrained(saved)
