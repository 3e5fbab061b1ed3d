"""Options of `train`: which there are for a speculator, and that they are the settings they stand for."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from verl_speculator import cli
from verl_speculator.trainer.config.compose import load_config

OWN = """
from dataclasses import dataclass, field
from verl_speculator.models import Speculator, SpeculatorConfig

@dataclass(kw_only=True)
class Arguments:
    width: int = field(default=7, metadata={{"help": "how wide, up to 100 %"}})
    vocab_file: str | None = None
    layers: list[int] = field(default_factory=list)
    deep: bool = False
    {more}

@SpeculatorConfig.register("{name}")
class OwnConfig(SpeculatorConfig):
    speculators_model_type: str = "{name}"
    training_arguments = Arguments

@Speculator.register("{name}")
class OwnModel(Speculator):
    def forward(self, **batch): ...
    @classmethod
    def from_training_args(cls, verifier_config, **kwargs): ...
    @staticmethod
    def get_trainer_kwargs(args): return {{}}, {{}}
"""


@pytest.fixture
def settings(monkeypatch):
    """The settings that a command line stands for."""
    found: list[list[str]] = []
    monkeypatch.setattr("verl_speculator.trainer.launch.launch", lambda overrides, **_: found.append(overrides))

    def read(*arguments: str) -> list[str]:
        assert cli.main(["train", *arguments]) == 0
        return found.pop()

    return read


def test_each_option_is_a_setting(settings) -> None:
    options = (
        "--verifier-name-or-path ./base --data-path train.parquet --val-data-path a.parquet --val-data-path b.parquet "
        "--save-path out --epochs 2 --max-steps 9 --lr 1e-3 --batch-size 8 --max-length 64 --total-seq-len 128 "
        "--checkpoint-freq after_each_epoch --val-freq 5 --from-pretrained spec"
    )
    values = {
        "model.partial_pretrain": "./base",
        "data.train_files": "train.parquet",
        "data.val_files": "[a.parquet,b.parquet]",
        "trainer.default_local_dir": "out",
        "model.speculator_path": "spec",
        "trainer.total_epochs": "2",
        "trainer.total_training_steps": "9",
        "optim.lr": "1e-3",
        "data.train_batch_size": "8",
        "data.max_length": "64",
        "data.max_token_len_per_gpu": "128",
        "trainer.save_freq": "after_each_epoch",
        "trainer.test_freq": "5",
    }
    assert settings(*options.split()) == [f"{key}={value}" for key, value in values.items()]
    # Every one of them is a key that there is.
    load_config(settings(*options.split()))
    assert settings("--engine", "megatron", "a.b=1") == ["engine=megatron", "optim=megatron", "a.b=1"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            "--speculator-type eagle3 --num-layers 2 --draft-vocab-size 8192 --ttt-steps 4 --no-norm-before-fc "
            "--fc-norm --target-layer-ids 1 2 3 --draft-vocab-path /data/t2d.npy",
            "model.speculator_type=eagle3 +model.speculator.num_layers=2 +model.speculator.ttt_steps=4 "
            "+model.speculator.target_layer_ids=[1,2,3] model.speculator.draft_vocab_size=8192 "
            "model.speculator.draft_vocab_path=/data/t2d.npy +model.speculator.norm_before_fc=false "
            "+model.speculator.fc_norm=true",
        ),
        (
            "--speculator-type mlp --n-predict 3 --inner-dim 64 --objective kl --no-tie-weights",
            "model.speculator_type=mlp model.speculator.n_predict=3 model.speculator.tie_weights=false "
            "model.speculator.inner_dim=64 model.speculator.objective=kl",
        ),
        ("--inner-dim 64.32 optim.lr=1", "model.speculator.inner_dim=64.32 optim.lr=1"),
        ("model.speculator_type=eagle3 --num-layers 2", "+model.speculator.num_layers=2 model.speculator_type=eagle3"),
    ],
)
def test_a_speculator_brings_its_own(settings, options, expected) -> None:
    assert settings(*options.split()) == expected.split()


def test_both_ways_compose_the_same_configuration(settings, good_run) -> None:
    flags = ["--speculator-type", "lstm", "--method", "sum_lstm", "--inner-dim", "32.48", "--lr", "5e-4", *good_run[:4]]
    keys = ["model.speculator_type=lstm", "model.speculator.method=sum_lstm", "model.speculator.inner_dim=32.48"]
    configs = [load_config(overrides) for overrides in (settings(*flags), [*keys, "optim.lr=5e-4", *good_run[:4]])]
    assert OmegaConf.to_yaml(configs[0]) == OmegaConf.to_yaml(configs[1])
    assert configs[0].model.speculator.inner_dim == "32.48"


@pytest.mark.parametrize("path", ["my chats, all=1.parquet", "null", "it's.parquet", "3", "{x}"])
def test_any_path_stays_as_it_is(settings, path) -> None:
    config = load_config(
        settings("--data-path", path, "--val-data-path", path, "--val-data-path", "b", "--save-path", path)
    )
    assert config.data.train_files == path
    assert config.data.val_files == [path, "b"]
    assert config.trainer.default_local_dir.endswith(f"/{path}")


def test_a_file_of_the_users_brings_type_and_options(settings, tmp_path, capsys) -> None:
    file = tmp_path / "own flags.py"
    file.write_text(OWN.format(name="own_flags", more=""))
    found = settings("--import", str(file), "--speculator-type", "own_flags", "--width", "3", "--layers", "1", "2")
    config = load_config(found)
    assert config.model.speculator_adapter == {"path": str(file), "name": "own_flags"}
    assert config.model.speculator.width == 3
    assert config.model.speculator.layers == [1, 2]
    with pytest.raises(SystemExit):
        cli.main(["train", "--import", str(file), "--speculator-type", "own_flags", "--help"])
    shown = capsys.readouterr().out.partition("options of own_flags:")[2]
    assert "how wide, up to 100 % (default: 7)" in shown
    assert "--vocab-file" in shown
    assert "--deep, --no-deep" in shown


def test_a_setting_called_like_an_option_of_every_run(tmp_path, capsys) -> None:
    file = tmp_path / "taken.py"
    file.write_text(OWN.format(name="taken_flags", more="epochs: int = 3"))
    assert cli.main(["train", "--import", str(file), "--speculator-type", "taken_flags"]) == 2
    assert "--epochs is an option of every run, so rename epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--speculator-type", "eagel3"], "there is no speculator 'eagel3'; did you mean 'eagle3'?"),
        (["--import", "absent.py", "--num-layers", "1"], "--import: there is no file 'absent.py'"),
        (["--lr", "1", "optim.lr=2"], "optim.lr is given twice, by an option and as key=value: leave one of them out"),
        (
            ["--speculator-type", "eagle3", "--ttt-steps", "1", "+model.speculator.ttt_steps=2"],
            "ttt_steps is given twice",
        ),
    ],
)
def test_a_mistake_is_one_sentence(arguments, reason, capsys) -> None:
    assert cli.main(["train", *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert reason in shown
    assert len(shown.splitlines()) == 1


def test_one_of_torchruns_processes_speaks(monkeypatch, capsys) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert cli.main(["train", "--speculator-type", "eagel3"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines
