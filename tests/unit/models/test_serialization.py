"""Speculator folders: what is written, what is accepted, and which sentence a broken one ends in."""

import json
import re
import zipfile
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


def all_tensors(folder):
    """As another project would write them: each tied copy with memory of its own, and no checksums."""
    return {name: t.clone() for name, t in torch.load(folder / "pytorch_model.bin", weights_only=True).items()}


def rewrite(folder, change):
    tensors = all_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


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
    tensors = all_tensors(saved)
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


def test_every_weight_is_written_once(saved):
    """`pytorch_model.bin` has the tied copies in the same memory, `model.safetensors` leaves them out."""
    speculator = Speculator.from_pretrained(saved)
    own = set(speculator.state_dict())
    names = {f"{kind}.{i}.weight" for kind in ("emb", "proj", "ln", "head") for i in range(3)}
    names |= {f"ln.{i}.bias" for i in range(3)}

    pickled = torch.load(saved / "pytorch_model.bin", weights_only=True)
    assert pickled.keys() == names
    assert len({tensor.data_ptr() for tensor in pickled.values()}) == len(own)
    assert load_file(saved / "model.safetensors").keys() == own
    size = sum(parameter.nbytes for parameter in speculator.parameters())
    for name in ("model.safetensors", "pytorch_model.bin"):
        assert size < (saved / name).stat().st_size < size + 10_000


def test_a_tied_mlp_of_an_8b_model_is_below_5_gb():
    """By arithmetic: the files of small shapes above hold the parameters' bytes, and here these are counted."""
    with torch.device("meta"):
        speculator = MLPSpeculator(MLPSpeculatorConfig(input_hidden_dim=4096, vocab_size=128256, n_predict=5))
    numbers = sum(parameter.numel() for parameter in speculator.parameters())
    assert 2 * numbers * torch.bfloat16.itemsize < 5e9
    # What it was: in float32, and five copies of embedding, head and most projections in either file.
    assert 2 * 5 * numbers * torch.float32.itemsize > 43e9


def test_a_folder_can_do_without_the_pickle(tmp_path):
    speculator = Speculator.from_config(CONFIG)
    speculator.save_pretrained(tmp_path, pytorch_bin=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same_weights(speculator, Speculator.from_pretrained(tmp_path))


def test_weights_are_written_in_the_type_asked_for(any_config, make_speculator, tmp_path):
    speculator = make_speculator(any_config)
    speculator.save_pretrained(tmp_path, dtype=torch.bfloat16)
    for file in ("model.safetensors", "pytorch_model.bin"):
        loaded = Speculator.from_pretrained(tmp_path)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        assert_same_weights(loaded, speculator.to(torch.bfloat16))
        (tmp_path / file).unlink()


def test_files_of_before_load(any_config, make_speculator, tmp_path):
    """With every tied copy written out in float32, and nothing in the metadata."""
    speculator = make_speculator(any_config)
    speculator.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: None)
    assert len(load_file(tmp_path / "model.safetensors")) == len(speculator.export_state_dict())
    assert_same_weights(speculator, Speculator.from_pretrained(tmp_path))


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
    with pytest.raises(CheckpointError, match=r"not full tensors with data: emb\.0\.weight"):
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
        self.register_buffer("token_map", torch.arange(2**40, 2**40 + 37))


def test_dtype_is_that_of_floating_point_tensors_only(tmp_path):
    MappedSpeculator(MappedConfig(input_hidden_dim=18, vocab_size=37, inner_dim=24)).save_pretrained(tmp_path)
    loaded = Speculator.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.token_map, torch.arange(2**40, 2**40 + 37))


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
    rewrite(saved, lambda tensors: None)
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


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({1: torch.zeros(1)}, "must hold tensors by name and nothing else"),
        ({"emb.0.weight": torch.zeros(37, 24), "speculator.emb.0.weight": torch.ones(37, 24)}, "without the prefix"),
        ({"emb.0.weight": torch.zeros(37, 24).to_sparse()}, "must|type|lacks"),
    ],
)
def test_strange_pickles(saved, contents, message):
    (saved / "model.safetensors").unlink()
    torch.save({**torch.load(saved / "pytorch_model.bin", weights_only=True), **contents}, saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        Speculator.from_pretrained(saved)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_are_no_real_numbers(saved, dtype):
    rewrite(saved, lambda tensors: tensors.update({"proj.0.weight": torch.zeros(24, 18).to(dtype)}))
    with pytest.raises(CheckpointError, match=r"of a type that cannot be used: proj\.0\.weight torch"):
        Speculator.from_pretrained(saved)


def test_one_flipped_bit_is_found(saved):
    """In every tensor, at either end of a number: in 21 of 34 places it once went unnoticed."""
    file = saved / "model.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for place in range(start, len(data), (len(data) - start) // 40):
        file.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged, tensors have changed since .*: \w+"):
            Speculator.from_pretrained(saved)


def test_a_config_that_the_weights_do_not_belong_to(saved):
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(values | {"scale_input": True}))
    with pytest.raises(CheckpointError, match=r"config\.json was changed .*: scale_input must be false, not true"):
        Speculator.from_pretrained(saved)
    # What does not change the numbers may be edited: the base has moved.
    (saved / "config.json").write_text(json.dumps(values | {"base_model_name_or_path": "elsewhere"}))
    assert Speculator.from_pretrained(saved).config.base_model_name_or_path == "elsewhere"


def test_oversized_files_are_not_read(saved):
    with (saved / "model.safetensors").open("r+b") as file:
        file.truncate(2**40)  # sparse: it takes no room on the disk
    with pytest.raises(CheckpointError, match="more than the tensors of its config"):
        Speculator.from_pretrained(saved)
    (saved / "model.safetensors").unlink()
    with zipfile.ZipFile(saved / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100 * 2**20))
    assert (saved / "pytorch_model.bin").stat().st_size < 2**20
    with pytest.raises(CheckpointError, match="more than the tensors of its config"):
        Speculator.from_pretrained(saved)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"n_predict": ' + "9" * 5000 + "}"])
def test_json_that_python_cannot_read(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json is not readable JSON: [^;]{10,100}$"):
        Speculator.from_pretrained(saved)


def test_huge_config(saved):
    (saved / "config.json").write_text("{" + " " * 5_000_000 + "}")
    with pytest.raises(CheckpointError, match=r"config\.json has 5000002 bytes"):
        Speculator.from_pretrained(saved)


@pytest.mark.parametrize("weight_map", [[], "x", {"emb.0.weight": 3}, {"a": ["b"]}, {"a": "b", "c": None}, {"a": {}}])
def test_index_entries_that_are_no_names(sharded, weight_map):
    folder, _ = sharded
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="must have a weight_map of names to file names"):
        Speculator.from_pretrained(folder)


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
