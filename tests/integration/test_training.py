"""Whole trainings under torchrun and Ray: what they log, write, resume and start from."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.integration.conftest import run_process
from tests.support.tiny import VOCAB_SIZE, write_base_model, write_chats
from verl_speculator.checkpoint import layout
from verl_speculator.data.rendering import render_chat
from verl_speculator.data.token_rows import tokenizer_fingerprint
from verl_speculator.models import Speculator
from verl_speculator.reports.curves import read_curves
from verl_speculator.trainer.checkpoints import LOCK_FILE

pytestmark = pytest.mark.slow

WIDTHS = [f"model.speculator.{name}_dim=32" for name in ("inner", "emb", "proj")]
STEPS = 6
STOP_TOKENS = [2, 0]
DRAFT_VOCAB_SIZE = 6
LOGGERS = "trainer.logger=[console,tensorboard,file]"
STOPPED_RUN = str(Path(__file__).with_name("stopped_run.py"))
CUSTOM_ADAPTER = Path(__file__).resolve().parents[2] / "examples" / "custom_adapter" / "gated_adapter.py"


def metrics_of(stdout: str) -> dict[int, dict[str, float]]:
    """The console logger's lines, as {step: {name: value}}; validation and training of a step come together."""
    steps: dict[int, dict[str, float]] = {}
    for step, line in re.findall(r"step:(\d+) - (.*)", stdout):
        pairs = (part.rpartition(":") for part in line.split(" - "))
        steps.setdefault(int(step), {}).update({name: float(value) for name, _, value in pairs})
    return steps


class Runs:
    """A folder with a base model and data, in which trainings run one after the other under one launch."""

    def __init__(self, folder: Path, torchrun) -> None:
        self.folder = folder
        self.torchrun = torchrun
        # Published in bfloat16 and trained in float32, and with a stop token that the tokenizer does not know.
        self.base = write_base_model(folder / "base", dtype=torch.bfloat16, stop_tokens=STOP_TOKENS)
        write_chats(folder / "train.parquet", 72)
        write_chats(folder / "val.parquet", 13, seed=1)
        self._write_mixed()

    def _write_mixed(self) -> None:
        """The training data again: one half as tokens, the other as chats."""
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        chats = pq.read_table(self.folder / "train.parquet")
        pq.write_table(chats.slice(36), self.folder / "chats.parquet")
        rendered = [render_chat(tokenizer, chat, "") for chat in chats["messages"].to_pylist()[:36]]
        columns = {name: [getattr(row, name) for row in rendered] for name in ("input_ids", "loss_mask")}
        mark = [tokenizer_fingerprint(tokenizer)] * 36
        pq.write_table(pa.table({**columns, "tokenizer": mark}), self.folder / "tokens.parquet")

    def overrides(self, name: str, *more: str) -> list[str]:
        return [
            f"model.partial_pretrain={self.base}",
            f"data.train_files={self.folder / 'train.parquet'}",
            f"data.val_files={self.folder / 'val.parquet'}",
            f"trainer.default_local_dir={self.folder / name}",
            "data.train_batch_size=12",
            "data.num_workers=0",
            "optim.lr=1e-2",
            "model.speculator.n_predict=3",
            *WIDTHS,
            *more,
        ]

    def run(self, num_processes: int, *runs: list[str]) -> list[dict[int, dict[str, float]]]:
        """Metrics of each run."""
        file = self.folder / "runs.json"
        file.write_text(json.dumps(runs))
        script = Path(__file__).with_name("trainer_runs.py")
        stdout = self.torchrun(num_processes, str(script), str(file), cwd=self.folder).stdout
        # The rank that logs prints the whole configuration at the start of each run.
        return [metrics_of(part) for part in stdout.split("{'model': {")[1:]]

    def weights(self, name: str, step: int = STEPS) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / f"global_step_{step}" / "speculator" / "model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, torchrun) -> Runs:
    return Runs(tmp_path_factory.mktemp("training"), torchrun)


LSTM = ["model.speculator.method=sum_lstm", f"trainer.total_training_steps={STEPS}", "trainer.save_freq=2"]


@pytest.fixture(scope="module")
def killed(runs) -> list[str]:
    """The command of a run whose processes were killed in the middle of their second save."""
    overrides = runs.overrides("killed", *LSTM)
    with pytest.raises(AssertionError, match="SIGKILL"):
        runs.torchrun(2, str(Path(__file__).with_name("killed_run.py")), *overrides)
    assert layout.complete_steps(runs.folder / "killed") == [2]
    shutil.copytree(runs.folder / "killed", runs.folder / "killed_one_process")
    return overrides


@pytest.fixture(scope="module")
def terminated(runs) -> list[str]:
    """The command of a run that ended at its fourth step because one of its two processes got SIGTERM."""
    overrides = runs.overrides("terminated", *LSTM, "trainer.save_freq=100")
    with pytest.raises(AssertionError) as failed:
        runs.torchrun(2, STOPPED_RUN, *overrides)
    assert str(failed.value).count("status 143") == 2
    assert "Stopped by SIGTERM after step 4: the same command goes on from there" in str(failed.value)
    assert layout.complete_steps(runs.folder / "terminated") == [4]
    return overrides


@pytest.fixture(scope="module")
def launched(runs, killed, terminated) -> dict[str, dict[int, dict[str, float]]]:
    """Runs that need nothing of each other's processes, in one launch of two."""
    joint = ["model.freeze_base_model=false", f"trainer.total_training_steps={STEPS}", "trainer.save_freq=3"]
    stop = "trainer.total_training_steps=3"
    custom = f"model.speculator_adapter={{path: {CUSTOM_ADAPTER}, name: GatedSpeculatorAdapter}}"
    drafts = [f"model.speculator.draft_vocab_size={DRAFT_VOCAB_SIZE}"]
    trained = f"model.speculator_path={runs.folder / 'whole' / f'global_step_{STEPS}'}"
    states, kept = (f"data.hidden_states_cache={runs.folder / name}" for name in ("states", "eagle3_states"))
    # With a learning rate at which nothing is learned, every validation is as good as the first.
    early = ["trainer.early_stop_patience=2", "trainer.test_freq=1", "trainer.save_freq=100", "optim.lr=1e-12"]
    early.append("trainer.max_ckpt_to_keep=1")
    # Into other micro-batches than when they were written.
    cut_otherwise = "data.max_token_len_per_gpu=512"

    def eagle3(name: str, *more: str) -> list[str]:
        layers = "+model.speculator.target_layer_ids=[0,1,2]"
        settings = ["model.speculator_type=eagle3", "data.max_length=512", "trainer.total_training_steps=2", *more]
        # The shared ones are of heads.
        return [*(text for text in runs.overrides(name, *settings) if not text.startswith("model.speculator.")), layers]

    mixed = f"data.train_files=[{runs.folder / 'tokens.parquet'},{runs.folder / 'chats.parquet'}]"
    table = {
        "whole": runs.overrides("whole", *LSTM, "trainer.test_freq=3", "trainer.max_ckpt_to_keep=2", LOGGERS),
        "evaluated": runs.overrides("evaluated", trained, "trainer.val_only=true"),
        "stopped": runs.overrides("stopped", mixed, *LSTM, stop),
        "resumed": runs.overrides("stopped", mixed, *LSTM),
        "joint": runs.overrides("joint", *joint),
        "joint_stopped": runs.overrides("joint_stopped", *joint, stop),
        "joint_resumed": runs.overrides("joint_stopped", *joint),
        "killed": killed,
        "terminated": terminated,
        "finished": runs.overrides("stopped", mixed, *LSTM),
        "custom": runs.overrides("custom", custom, *drafts, "trainer.total_training_steps=2"),
        "custom_resumed": runs.overrides("custom", custom, *drafts, "trainer.total_training_steps=3"),
        "states_stopped": runs.overrides("states_resumed", *LSTM, states, stop, "trainer.test_freq=3"),
        "states_resumed": runs.overrides("states_resumed", *LSTM, states, "trainer.test_freq=3"),
        "states_read": runs.overrides("states_read", *LSTM, states, "trainer.test_freq=3"),
        "early": runs.overrides("early", *LSTM, *early),
        "early_again": runs.overrides("early", *LSTM, *early),
        "eagle3_plain": eagle3("eagle3_plain"),
        "eagle3_written": eagle3("eagle3_written", kept),
        "eagle3_read": eagle3("eagle3_read", kept, cut_otherwise),
        "mlp": runs.overrides(
            "mlp",
            "model.speculator_adapter={fqn: verl_speculator.adapters.MLPSpeculatorAdapter}",
            "model.speculator.inner_dim=32",
            "+model.speculator.torch_dtype=bfloat16",
            "model.save_pytorch_model_bin=false",
            "trainer.total_training_steps=2",
            "model.use_remove_padding=false",
            "data.use_dynamic_bsz=false",
            "data.micro_batch_size_per_gpu=3",
        ),
    }
    return dict(zip(table, runs.run(2, *table.values()), strict=True))


def test_logs_what_a_step_did(launched) -> None:
    steps = launched["whole"]
    assert sorted(steps) == list(range(1, STEPS + 1))
    expected = {"loss", "acceptance_length", "speculator_loss", "grad_norm", "lr", "global_tokens"}
    expected |= {f"head_{i}/{what}" for i in range(3) for what in ("loss", "accuracy")}
    assert {f"train/{name}" for name in expected} <= set(steps[1])
    assert steps[1]["perf/tokens_per_second"] > 0
    heads = [steps[1][f"train/head_{i}/loss"] for i in range(3)]
    assert steps[1]["train/loss"] == pytest.approx(sum(heads) / 3, rel=1e-5)
    assert steps[STEPS]["train/loss"] < steps[1]["train/loss"] - 0.5


def test_verls_loggers_get_the_metrics(runs, launched) -> None:
    [file] = runs.folder.rglob("speculator.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    logged = {line["step"]: line["data"]["train/loss"] for line in lines if "train/loss" in line["data"]}
    assert logged == {step: pytest.approx(metrics["train/loss"]) for step, metrics in launched["whole"].items()}
    assert list(runs.folder.rglob("events.out.tfevents*"))


def test_every_run_leaves_its_metrics_in_its_folder(runs, launched) -> None:
    """A resumed run goes on in the same file, as if it had never stopped."""
    wanted = {step: metrics["train/loss"] for step, metrics in launched["whole"].items()}
    for name in ("whole", "stopped"):
        assert dict(read_curves(runs.folder / name).points("train/loss")) == pytest.approx(wanted, rel=1e-5), name
    accepted = read_curves(runs.folder / "whole").points("val/closed_loop_acceptance_length")
    assert [step for step, _ in accepted] == [3, STEPS]


def test_validates_on_schedule_and_at_the_end(launched) -> None:
    steps = launched["whole"]
    assert [step for step in steps if "val/loss" in steps[step]] == [3, STEPS]
    assert steps[STEPS]["val/loss"] < steps[3]["val/loss"]


def test_a_trained_speculator_is_evaluated_at_once(launched) -> None:
    final = launched["whole"][STEPS]
    at_once = launched["evaluated"][0]
    for name in ("val/loss", "val/acceptance_length", "val/head_2/accuracy"):
        assert at_once[name] == pytest.approx(final[name], rel=1e-6)


def test_checkpoint_holds_the_speculator_and_no_base(runs, launched) -> None:
    root = runs.folder / "whole"
    assert layout.complete_steps(root) == [4, STEPS], "max_ckpt_to_keep=2"
    folder = root / f"global_step_{STEPS}"
    assert {path.name for path in folder.iterdir()} == {"speculator", "resume", "run_config.yaml"}
    assert {path.name for path in (folder / "speculator").iterdir()} == {
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
    }
    speculator = Speculator.from_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    weights = sum(parameter.numel() for parameter in speculator.parameters()) * 4
    # Two files of weights to serve, which on a CPU have the type that trains, those to go on from, two Adam moments.
    assert 5 * weights < size < 5 * weights + 300_000


def test_stopping_and_resuming_changes_nothing(runs, launched) -> None:
    """Nor does it matter that half of these data are tokens."""
    for name, tensor in runs.weights("whole").items():
        assert torch.equal(tensor, runs.weights("stopped")[name]), name
    for step in range(4, STEPS + 1):
        for name in ("train/loss", "train/grad_norm", "train/acceptance_length"):
            assert launched["resumed"][step][name] == launched["whole"][step][name]
    assert min(launched["resumed"]) == 4


def test_joint_training_trains_both_and_resumes(runs, launched) -> None:
    steps = launched["joint"]
    for name in ("train/base_loss", "train/speculator_loss", "val/base_loss"):
        assert name in steps[STEPS]
    assert steps[STEPS]["train/base_loss"] < steps[1]["train/base_loss"]
    total = steps[1]["train/base_loss"] + steps[1]["train/speculator_loss"]
    assert steps[1]["train/loss"] == pytest.approx(total, rel=1e-5)
    for name, tensor in runs.weights("joint").items():
        assert torch.equal(tensor, runs.weights("joint_stopped")[name]), name
    base = [
        load_file(runs.folder / run / f"global_step_{STEPS}" / "huggingface" / "model.safetensors")
        for run in ("joint", "joint_stopped")
    ]
    assert all(torch.equal(base[0][name], base[1][name]) for name in base[0])
    untrained = load_file(runs.base / "model.safetensors")
    assert any(not torch.equal(base[0][name], untrained[name]) for name in untrained)


def test_a_jointly_trained_base_stays_what_it_was(runs, launched) -> None:
    """Its type, its stop tokens and its class; what it trains in is in `resume/`."""
    folder = runs.folder / "joint" / f"global_step_{STEPS}" / "huggingface"
    before, after = load_file(runs.base / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in after.items()} == {
        name: (tensor.shape, torch.bfloat16) for name, tensor in before.items()
    }
    config, published = (json.loads((base / "config.json").read_text()) for base in (folder, runs.base))
    assert config["dtype"] == published["dtype"] == "bfloat16"
    assert config["architectures"] == published["architectures"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == STOP_TOKENS


def test_a_joint_checkpoint_does_not_go_on_with_a_frozen_base(runs, launched) -> None:
    """The base that its speculator follows would be replaced by the untrained one."""
    folder = runs.folder / "joint_older"
    shutil.copytree(runs.folder / "joint_stopped", folder)
    # Checkpoints of older versions do not say how they were trained, so the engine looks at what they hold.
    for file in folder.rglob(layout.RUN_CONFIG_FILE):
        file.unlink()
    with pytest.raises(AssertionError, match=r"written with model\.freeze_base_model=false") as failure:
        runs.run(1, runs.overrides("joint_older", f"trainer.total_training_steps={STEPS + 1}"))
    assert f"model.speculator_path={folder / f'global_step_{STEPS}'}" in str(failure.value)


def test_an_adapter_from_a_file_trains(runs, launched) -> None:
    assert launched["custom"][2]["train/loss"] < launched["custom"][1]["train/loss"]
    assert (runs.folder / "custom" / "global_step_2" / "speculator" / "model.safetensors").is_file()


def test_a_draft_vocabulary_is_that_of_the_training_data(runs, launched) -> None:
    """Of an adapter from a file, too; a resumed run keeps it."""
    t2d = torch.from_numpy(np.load(runs.folder / "custom" / "draft_vocabulary.npy"))
    assert t2d.sum() == DRAFT_VOCAB_SIZE
    tokenizer = AutoTokenizer.from_pretrained(runs.base)
    counts: Counter[int] = Counter()
    for chat in pq.read_table(runs.folder / "train.parquet")["messages"].to_pylist():
        counts.update(tokenizer.encode(chat[1]["content"]))
    frequent = {token for token, _ in counts.most_common(DRAFT_VOCAB_SIZE // 2)}
    assert frequent <= set(t2d.nonzero().squeeze(1).tolist())
    for step in (2, 3):
        tensors = runs.weights("custom", step)
        assert torch.equal(tensors["d2t"] + torch.arange(DRAFT_VOCAB_SIZE), t2d.nonzero().squeeze(1))
        assert tensors["head.0.weight"].shape[0] == DRAFT_VOCAB_SIZE
        assert tensors["emb.weight"].shape[0] == VOCAB_SIZE
    assert 0 < launched["custom"][1]["train/head_0/outside"] < 0.8
    assert min(launched["custom_resumed"]) == 3


def test_the_mlp_speculator_trains_on_padded_batches(runs, launched) -> None:
    assert launched["mlp"][2]["train/loss"] < launched["mlp"][1]["train/loss"]
    folder = runs.folder / "mlp" / "global_step_2" / "speculator"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["MLPSpeculatorPreTrainedModel"]
    # In the type asked for, although it trained in float32, and without the file that was switched off.
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert {tensor.dtype for tensor in runs.weights("mlp", step=2).values()} == {torch.bfloat16}
    on_cpu = json.loads((runs.folder / "custom" / "global_step_2" / "speculator" / "config.json").read_text())
    assert on_cpu["torch_dtype"] == "float32"


def test_stops_early_and_keeps_the_best(runs, launched) -> None:
    assert sorted(launched["early"]) == [1, 2, 3]
    assert launched["early_again"] == {}
    assert layout.complete_steps(runs.folder / "early") == [1, 3], "max_ckpt_to_keep=1, and the best"
    best = Speculator.from_pretrained(runs.folder / "early").state_dict()
    for name, tensor in Speculator.from_pretrained(runs.folder / "early" / "global_step_1").state_dict().items():
        assert torch.equal(best[name], tensor), name


def test_hidden_states_from_disk_train_like_those_of_the_base(runs, launched) -> None:
    """To the last bit, in a run that stopped while it wrote them and went on, and in one that reads them."""
    for name, tensor in runs.weights("whole").items():
        assert torch.equal(tensor, runs.weights("states_resumed")[name]), name
        assert torch.equal(tensor, runs.weights("states_read")[name]), name
    written = launched["states_stopped"] | launched["states_resumed"]
    assert [written[step]["perf/step_saved"] for step in range(1, STEPS + 1)] == [0] * STEPS
    for step in range(1, STEPS + 1):
        read = launched["states_read"][step]
        assert 0 < read["perf/step_saved"] < 1
        assert read["perf/base_seconds_saved"] > 0
        assert read["train/loss"] == launched["whole"][step]["train/loss"]
    assert launched["states_read"][STEPS]["val/loss"] == launched["whole"][STEPS]["val/loss"]


def test_hidden_states_of_the_layers_that_an_algorithm_needs(launched) -> None:
    plain, written, read = (launched[f"eagle3_{how}"] for how in ("plain", "written", "read"))
    for step in (1, 2):
        assert written[step]["train/loss"] == plain[step]["train/loss"]
        assert read[step]["train/loss"] == pytest.approx(plain[step]["train/loss"], rel=1e-5)
        assert read[step]["perf/base_seconds_saved"] > 0


def test_killed_in_a_save_then_resumed_is_the_uninterrupted_run(runs, launched) -> None:
    assert min(launched["killed"]) == 3
    hidden = {path.name for path in (runs.folder / "killed").iterdir() if path.name.startswith(".")}
    assert hidden == {LOCK_FILE}
    for name, tensor in runs.weights("whole").items():
        assert torch.equal(tensor, runs.weights("killed")[name]), name

    # One process reads what two have written.
    states = f"data.hidden_states_cache={runs.folder / 'states'}"
    [alone] = runs.run(1, runs.overrides("killed_one_process", *LSTM, states))
    assert alone[STEPS]["perf/base_seconds_saved"] > 0
    assert min(alone) == 3
    for name, tensor in runs.weights("whole").items():
        torch.testing.assert_close(runs.weights("killed_one_process")[name], tensor, rtol=0, atol=2e-5)


def test_terminated_then_resumed_is_the_uninterrupted_run(runs, launched) -> None:
    assert min(launched["terminated"]) == 5
    for name, tensor in runs.weights("whole").items():
        assert torch.equal(tensor, runs.weights("terminated")[name]), name


def test_a_finished_run_does_nothing(launched) -> None:
    assert launched["finished"] == {}


def test_ray_trains_like_torchrun_and_resumes_after_sigterm(runs, launched, verl_speculator) -> None:
    """The Ray twin: two workers, the same numbers."""
    states = f"data.hidden_states_cache={runs.folder / 'states'}"
    stopped = runs.overrides("ray", *LSTM, "trainer.save_freq=100", "trainer.n_gpus_per_node=2", states)
    first = run_process([sys.executable, STOPPED_RUN, "--ray", *stopped])
    assert first.returncode == 143, first.stdout[-3000:] + first.stderr[-6000:]
    assert "Stopped by SIGTERM after step 4: the same command goes on from there" in first.stdout
    # A draft vocabulary has no part in the states, and its file none in their folder.
    settings = runs.overrides("ray", states, "model.speculator.draft_vocab_size=16")
    completed = verl_speculator("data", "hidden-states", "--nproc", "2", *settings)
    assert "states: complete" in completed.stdout, completed.stdout[-3000:] + completed.stderr[-6000:]
    assert not list((runs.folder / "states").glob("draft_vocabulary*"))
    second = verl_speculator("train", "--ray", "--nproc", "2", *runs.overrides("ray", *LSTM, states))
    assert "of the base's layers only the first is loaded" in second.stdout
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-6000:]

    metrics, reference = metrics_of(first.stdout) | metrics_of(second.stdout), launched["whole"]
    assert sorted(metrics_of(second.stdout)) == [5, STEPS]
    for step in range(1, STEPS + 1):
        assert metrics[step]["perf/base_seconds_saved"] > 0
        for name in ("train/loss", "train/grad_norm", "train/head_0/accuracy", "train/global_tokens"):
            assert metrics[step][name] == pytest.approx(reference[step][name], rel=1e-4)
    assert metrics[STEPS]["val/loss"] == pytest.approx(reference[STEPS]["val/loss"], rel=1e-4)
    for name, tensor in runs.weights("whole").items():
        torch.testing.assert_close(runs.weights("ray")[name], tensor, rtol=0, atol=5e-5)
