"""Training goes on bit by bit where it stopped, on any number of ranks, and a stranger's checkpoint runs no code."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from verl_speculator.checkpoint import layout
from verl_speculator.checkpoint.training_state import (
    full_state_dict,
    load_training_state,
    save_speculator,
    save_training_state,
)
from verl_speculator.errors import CheckpointError
from verl_speculator.models import MLPSpeculatorConfig, Speculator

CONFIG = MLPSpeculatorConfig(input_hidden_dim=6, vocab_size=13, n_predict=3, inner_dim=5)


class Unit(torch.nn.Module):
    """As the engine's: FSDP gathers the weights around its forward."""

    def __init__(self, speculator: Speculator) -> None:
        super().__init__()
        self.speculator = speculator

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.speculator(*inputs)


class Training:
    """Two sharded modules under one optimizer, as in joint training, and a scheduler; every step has its own data."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.speculator = Speculator.from_config(CONFIG)
        self.unit = Unit(self.speculator)
        # Widths that three ranks, and even two, cannot divide evenly.
        self.base = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Linear(7, 6))
        for module in (self.unit, self.base):
            fully_shard(module, mesh=mesh)
        self.trained = torch.nn.ModuleDict({"base": self.base, "unit": self.unit})
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def step(self, number: int) -> None:
        # The same rows on every rank: then the number of ranks changes nothing.
        generator = torch.Generator().manual_seed(number)
        hidden, tokens = torch.randn(2, 4, 6, generator=generator), torch.randint(13, (2, 7), generator=generator)
        self.unit(self.base(hidden), tokens).logsumexp(-1).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def save(self, folder: Path) -> None:
        save_speculator(folder, self.speculator, self.unit, "speculator.")
        save_training_state(folder, self.trained, self.optimizer, self.scheduler, self.base)
        dist.barrier()

    def load(self, folder: Path) -> None:
        load_training_state(folder, self.trained, self.optimizer, self.scheduler, self.base)

    def weights(self) -> dict[str, torch.Tensor]:
        states = {name: full_state_dict(module) for name, module in (("unit", self.unit), ("base", self.base))}
        return {f"{part}.{name}": tensor.clone() for part, state in states.items() for name, tensor in state.items()}


def _init(rank: int, world_size: int, store_file: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(store_file), world_size), rank=rank, world_size=world_size)


def _train_and_save(rank: int, folder: Path) -> None:
    """Two ranks: two steps, a checkpoint, and the weights and draws of going on."""
    _init(rank, 2, folder / "store")
    training = Training(seed=0)
    training.step(0)
    training.step(1)
    torch.manual_seed(rank)
    training.save(folder / "global_step_2")
    drawn = torch.rand(3)
    training.step(2)
    if weights := training.weights():
        save_file(weights, folder / "expected.safetensors")
    again = Training(seed=1)
    again.load(folder / "global_step_2")
    assert torch.equal(torch.rand(3), drawn), "each rank has its own random numbers"
    again.step(2)
    for name, tensor in again.weights().items():
        assert torch.equal(tensor, weights[name]), name
    dist.destroy_process_group()


def _go_on(rank: int, folder: Path) -> None:
    _init(rank, 3, folder / "store_of_three")
    training = Training(seed=1)
    training.load(folder / "global_step_2")
    training.step(2)
    if weights := training.weights():
        save_file(weights, folder / "on_three.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of `_train_and_save`, which compares with going on on as many ranks."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "global_step_2").mkdir()
    mp.spawn(_train_and_save, (folder,), nprocs=2)
    return folder


def assert_same(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_going_on_is_bit_exact_on_one_rank(trained, alone) -> None:
    training = Training(seed=1)
    training.load(trained / "global_step_2")
    assert training.scheduler.get_last_lr() == [1e-2 * (1 / 3)]
    training.step(2)
    assert_same(load_file(trained / "expected.safetensors"), training.weights())


def test_going_on_is_bit_exact_on_three_ranks(trained) -> None:
    mp.spawn(_go_on, (trained,), nprocs=3)
    assert_same(load_file(trained / "expected.safetensors"), load_file(trained / "on_three.safetensors"))


def test_what_is_served_is_smaller_than_what_trains(trained) -> None:
    folder = trained / "global_step_2"
    served = Speculator.from_pretrained(folder)
    assert {parameter.dtype for parameter in served.parameters()} == {torch.bfloat16}, "as its torch_dtype says"
    size = sum(parameter.nbytes for parameter in served.parameters())
    for name in ("model.safetensors", "pytorch_model.bin"):
        assert (folder / "speculator" / name).stat().st_size < size + 10_000
    pieces = [load_file(file) for file in sorted((folder / "resume" / "tensors").iterdir())]
    assert {tensor.dtype for piece in pieces for tensor in piece.values()} == {torch.float32}


def test_nothing_is_pickled(trained) -> None:
    files = [file for file in (trained / "global_step_2" / "resume").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json"}


@pytest.fixture
def alone(tmp_path):
    """This process as the only rank."""
    _init(0, 1, tmp_path / "store")
    yield
    dist.destroy_process_group()


@pytest.fixture
def saved(alone, tmp_path) -> Path:
    folder = tmp_path / "global_step_1"
    folder.mkdir()
    training = Training(seed=0)
    training.step(0)
    training.save(folder)
    return folder


class Malicious:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return (Path.touch, (self.proof,))


def test_a_malicious_checkpoint_runs_no_code(saved, tmp_path) -> None:
    """As earlier versions read it: the metadata of torch's reader, and what torch.load would be given."""
    proof, resume = tmp_path / "code_was_run", saved / "resume"
    for name in ("optimizer/.metadata", "tensors/.metadata", "scheduler.pt", "random_rank_0.pt"):
        (resume / name).parent.mkdir(exist_ok=True)
        with (resume / name).open("wb") as file:
            pickle.dump(Metadata({}, storage_data=Malicious(proof)), file)
    Training(seed=1).load(saved)
    assert not proof.exists()

    # One that has nothing else is refused, and says what to do, before a model is loaded.
    shutil.rmtree(resume / "tensors")
    (resume / "values.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        Training(seed=1).load(saved)
    with pytest.raises(CheckpointError, match=rf"earlier version.*model\.speculator_path={saved}"):
        layout.check_intact(saved)
    assert not proof.exists()


def _change(file: Path, change) -> None:
    """Rewrite a file of tensors; `change` gets them and what is said of them."""
    with safe_open(file, framework="pt") as opened:
        described = json.loads(opened.metadata()["pieces"])
    tensors = load_file(file)
    change(tensors, described)
    save_file(tensors, file, metadata={"pieces": json.dumps(described)})


NAME = "weights.0.1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, d: t.pop(NAME), f"{NAME} is missing"),
        (lambda t, d: t.update({NAME: t[NAME][:-1].clone()}), f"{NAME} is missing or not complete"),
        (lambda t, d: t.update({NAME: t[NAME].double()}), f"{NAME} is torch.float64 instead of torch.float32"),
        (lambda t, d: d[NAME].update(full_shape=[60, 70]), rf"{NAME} is \[60, 70\] instead of \[6, 7\]"),
        (lambda t, d: d[NAME].update(offset=[1]), f"does not say where {NAME} belongs"),
        (lambda t, d: d[NAME].update(offset=[3, 0]), f"{NAME} is missing or not complete"),
        (lambda t, d: d[NAME].update(offset="x"), "cannot be read"),
        (lambda t, d: d.pop(NAME), "cannot be read"),
        (lambda t, d: d.clear(), "cannot be read"),
    ],
)
def test_wrong_pieces(saved, change, message) -> None:
    _change(saved / "resume" / "tensors" / "rank_0.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        Training(seed=1).load(saved)


@pytest.mark.parametrize("name", ["values.json", "tensors/rank_0.safetensors", "random_rank_0.safetensors"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"[]"])
def test_damaged_files(saved, name, damage) -> None:
    file = saved / "resume" / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match="cannot be read"):
        Training(seed=1).load(saved)


def test_a_checkpoint_of_a_frozen_base_has_none_to_go_on_training(alone, tmp_path) -> None:
    training = Training(seed=0)
    optimizer = torch.optim.AdamW(training.unit.parameters())
    save_training_state(tmp_path, training.unit, optimizer, training.scheduler, None)
    with pytest.raises(CheckpointError, match=r"written with model\.freeze_base_model=true"):
        training.load(tmp_path)
    other = Training(seed=1)
    load_training_state(tmp_path, other.unit, torch.optim.AdamW(other.unit.parameters()), other.scheduler, None)
    for one, two in zip(training.unit.parameters(), other.unit.parameters(), strict=True):
        assert torch.equal(one.to_local(), two.to_local())
