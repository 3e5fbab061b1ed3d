"""500 damaged folders: each loads as it was or ends in one sentence, and none in a raw error or a hang."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from verl_speculator.algorithms.eagle3 import Eagle3SpeculatorConfig
from verl_speculator.errors import CheckpointError, MissingFileError
from verl_speculator.models import ArcticLSTMSpeculatorConfig, MLPSpeculatorConfig, Speculator

TRIALS = 100  # for each of five folders
SECONDS = 60  # of one trial, which takes some milliseconds: more is a hang

SIZES = {"input_hidden_dim": 18, "vocab_size": 37, "n_predict": 3, "base_model_name_or_path": "owner/base"}
WIDTHS = {"inner_dim": "24.20", "emb_dim": "24", "proj_dim": "24"}
# The kinds of folders: how it was written, and what.
FOLDERS = {
    "ours": MLPSpeculatorConfig(**SIZES, inner_dim=24),
    "ours_lstm": ArcticLSTMSpeculatorConfig(**SIZES, **WIDTHS, method="sum_lstm"),
    "pickle_only": MLPSpeculatorConfig(**SIZES, inner_dim=24, tie_weights=False, scale_input=True),
    "eagle3": Eagle3SpeculatorConfig(
        **SIZES,
        transformer_layer_config={
            "model_type": "llama",
            "hidden_size": 18,
            "intermediate_size": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "vocab_size": 37,
            "rms_norm_eps": 1e-6,
        },
        draft_vocab_size=20,
        eagle_aux_hidden_state_layer_ids=[0, 1],
    ),
    "sharded": ArcticLSTMSpeculatorConfig(**SIZES, **WIDTHS, tie_weights=False),
}
# Free text, whatever it says. That an engine is to use another type is no other speculator either.
NOT_COMPARED = ("base_model_name_or_path", "base_model_archs", "torch_dtype")


@pytest.fixture(params=FOLDERS)
def folder(request, make_speculator, tmp_path) -> Path:
    speculator = make_speculator(FOLDERS[request.param])
    path = tmp_path / "speculator"
    speculator.save_pretrained(path)
    if request.param == "pickle_only":
        (path / "model.safetensors").unlink()
    elif request.param == "sharded":
        for name in ("model.safetensors", "pytorch_model.bin"):
            (path / name).unlink()
        save_torch_state_dict(speculator.export_state_dict(), path, max_shard_size=4000)
    return path


def flip_bits(folder: Path, rng: random.Random) -> None:
    file = _any_file(folder, rng, checked=True)
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def flip_bits_near_the_start(folder: Path, rng: random.Random) -> None:
    """Where names, types, shapes and places are."""
    file = _any_file(folder, rng, checked=True)
    data = bytearray(file.read_bytes())
    data[rng.randrange(min(len(data), 1500))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(folder: Path, rng: random.Random) -> None:
    file = _any_file(folder, rng)
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])


def overwrite(folder: Path, rng: random.Random) -> None:
    file = _any_file(folder, rng, checked=True)
    data = bytearray(file.read_bytes())
    start = rng.randrange(len(data))
    length = rng.choice((1, 4, 512, 4096))
    data[start : start + length] = rng.choice((rng.randbytes(length), bytes(length)))[: len(data) - start]
    file.write_bytes(data)


def swap_blocks(folder: Path, rng: random.Random) -> None:
    file = _any_file(folder, rng, checked=True)
    data = file.read_bytes()
    length = min(rng.choice((1, 16, 512)), len(data) // 2)
    first = rng.randrange(len(data) - 2 * length + 1)
    second = rng.randrange(first + length, len(data) - length + 1)
    one, other = data[first : first + length], data[second : second + length]
    file.write_bytes(data[:first] + other + data[first + length : second] + one + data[second + length :])


def swap_files(folder: Path, rng: random.Random) -> None:
    one, other = rng.sample(sorted(folder.iterdir()), 2)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def swap_values(folder: Path, rng: random.Random) -> None:
    values = json.loads((folder / "config.json").read_text())
    one, other = rng.sample(sorted(values), 2)
    values[one], values[other] = values[other], values[one]
    (folder / "config.json").write_text(json.dumps(values))


def remove_file(folder: Path, rng: random.Random) -> None:
    file = _any_file(folder, rng)
    file.unlink()
    if rng.random() < 0.5:
        file.mkdir()


def mistype_value(folder: Path, rng: random.Random) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    key = rng.choice(sorted(values))
    strange = [None, [], {}, [values[key]], {"a": values[key]}, "", "x", -1, 0, 1.5, 10**9, 10**40, "9" * 30, [[]]]
    values[key] = rng.choice([value for value in strange if type(value) is not type(values[key])] + ["9" * 6000, -7])
    file.write_text(json.dumps(values))


def mistype_tensor(folder: Path, rng: random.Random) -> None:
    """As a tool would write it that got one thing wrong: no checksums are there to tell."""
    file = _any_file(folder, rng, suffixes=(".safetensors", ".bin"))
    is_bin = file.suffix == ".bin"
    tensors = torch.load(file, weights_only=True) if is_bin else load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    name = rng.choice(sorted(tensors))
    changed = rng.choice(("type", "shape", "name", "missing", "extra", "object"))
    if changed == "type":
        tensors[name] = tensors[name].to(rng.choice((torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn)))
    elif changed == "shape":
        tensors[name] = rng.choice((tensors[name][:-1], tensors[name][None], tensors[name].flatten()[0]))
        tensors[name] = tensors[name].clone()
    elif changed == "name":
        tensors[name[:-1]] = tensors.pop(name)
    elif changed == "missing":
        del tensors[name]
    else:
        tensors[rng.choice(("extra", "", "a" * 5000, "speculator." + name))] = torch.zeros(3)
    if is_bin:
        if changed == "object":
            tensors = rng.choice(([], list(tensors.values()), tensors | {1: torch.zeros(1)}, tensors | {"x": 1}, None))
        torch.save(tensors, file)
    else:
        save_file(tensors, file)


def enlarge(folder: Path, rng: random.Random) -> None:
    file = _any_file(folder, rng)
    way = rng.choice(("sparse", "garbage", "nested", "keys"))
    if way == "sparse":
        with file.open("r+b") as opened:
            opened.truncate(rng.choice((10**8, 2**40)))
    elif way == "garbage":
        file.write_bytes(file.read_bytes() + rng.randbytes(rng.choice((1, 8, 100_000))))
    elif way == "nested":
        (folder / "config.json").write_text('{"a":' * rng.choice((500, 200_000)))
    else:
        values = json.loads((folder / "config.json").read_text())
        count = rng.choice((3, 1000))
        (folder / "config.json").write_text(json.dumps(values | {f"k{i}": [i] * 100 for i in range(count)}))


CORRUPTIONS = [
    flip_bits,
    flip_bits,
    flip_bits_near_the_start,
    truncate,
    overwrite,
    swap_blocks,
    swap_files,
    swap_values,
    remove_file,
    mistype_value,
    mistype_tensor,
    enlarge,
]


def test_no_corruption_is_silent_raw_or_endless(folder, tmp_path) -> None:
    good = Speculator.from_pretrained(folder)
    refused = 0
    for trial in range(TRIALS):
        rng = random.Random(trial)
        corrupt = CORRUPTIONS[trial % len(CORRUPTIONS)]
        damaged = tmp_path / "damaged"
        shutil.copytree(folder, damaged)
        corrupt(damaged, rng)
        what = f"trial {trial}, {corrupt.__name__}"
        with _at_most(SECONDS, what):
            try:
                loaded = Speculator.from_pretrained(damaged)
            except (CheckpointError, MissingFileError) as error:
                refused += 1
                message = str(error)
                assert "\n" not in message, what
                assert str(damaged) in message, what
                assert len(message) < 1500, what
            except Exception as error:
                raise AssertionError(f"{what} ended in a raw {type(error).__name__}: {error}") from error
            else:
                assert _facts(loaded) == _facts(good), what
                state = loaded.state_dict()
                for name, tensor in good.state_dict().items():
                    assert torch.equal(state[name], tensor), f"{what} silently changed {name}"
        shutil.rmtree(damaged)
    # Some damage does not touch what is read: a file that is not needed, blanks, keys that mean nothing.
    assert refused > TRIALS // 2


def _facts(speculator: Speculator) -> dict:
    return {key: value for key, value in speculator.config.to_dict().items() if key not in NOT_COMPARED}


def _any_file(folder: Path, rng: random.Random, suffixes: tuple[str, ...] = (), *, checked: bool = False) -> Path:
    """A file of the folder; with `checked` none in which nothing tells a changed number from a right one.

    Other projects' safetensors files carry no checksums.
    """
    files = [file for file in sorted(folder.iterdir()) if not suffixes or file.suffix in suffixes]
    if checked:
        files = [file for file in files if not file.name.startswith("model-")]
    return rng.choice(files)


@contextmanager
def _at_most(seconds: int, what: str) -> Iterator[None]:
    def hang(*_) -> None:
        raise AssertionError(f"{what} did not end in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
