"""Algorithms by name: what registers, what is refused, and what finds a class from a file or another package."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from verl_speculator.errors import CheckpointError, ConfigError
from verl_speculator.models import ArcticLSTMSpeculator, ChainSpeculator, MLPSpeculator, Speculator, SpeculatorConfig
from verl_speculator.models import config as config_module
from verl_speculator.models import speculator as speculator_module
from verl_speculator.models.importing import import_code

ALGORITHM = """
import torch
from verl_speculator.models import Speculator, SpeculatorConfig

@SpeculatorConfig.register("{name}")
class OwnConfig(SpeculatorConfig):
    speculators_model_type: str = "{name}"
    width: int = 3

@Speculator.register("{name}")
class {name}Model(Speculator):
    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(config.width, config.vocab_size)
    def forward(self, **batch): ...
    @classmethod
    def from_training_args(cls, verifier_config, **kwargs): ...
    @staticmethod
    def get_trainer_kwargs(args): return {{}}, {{}}
"""


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """Nothing that a test registers stays."""
    for module, name in (
        (config_module, "_BY_NAME"),
        (config_module, "_CONFIG_CLASSES"),
        (speculator_module, "_MODEL_CLASSES"),
    ):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    for name in ("_BY_NAME", "_CONFIG_CLASSES"):
        monkeypatch.setattr(speculator_module, name, getattr(config_module, name))


def register_config(name: str) -> type[SpeculatorConfig]:
    config_class = type(f"{name}Config", (SpeculatorConfig,), {"speculators_model_type": name, "__annotations__": {}})
    return SpeculatorConfig.register(name)(config_class)


def make_model(*without: str) -> type[Speculator]:
    methods: dict[str, Any] = {
        "forward": lambda self: None,
        "from_training_args": classmethod(lambda cls, verifier_config, **kwargs: None),
        "get_trainer_kwargs": staticmethod(lambda args: ({}, {})),
    }
    return type("Model", (Speculator,), {name: method for name, method in methods.items() if name not in without})


def test_our_own_are_found_by_name() -> None:
    assert Speculator.get_class("mlp") is MLPSpeculator
    assert ChainSpeculator.get_class("lstm") is ArcticLSTMSpeculator


def test_an_algorithm_from_a_file_is_saved_and_found_again(tmp_path) -> None:
    file = tmp_path / "own.py"
    file.write_text(ALGORITHM.format(name="alpha"))
    module = import_code(str(file), "--import")
    assert Speculator.get_class("alpha") is module.alphaModel

    speculator = Speculator.from_config(module.OwnConfig(input_hidden_dim=4, vocab_size=7, width=5))
    speculator.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["speculators_model_type"] == "alpha"
    assert written["architectures"] == ["alphaModel"]
    assert written["width"] == 5
    loaded = Speculator.from_pretrained(tmp_path / "saved")
    assert type(loaded) is module.alphaModel
    assert torch.equal(loaded.layer.weight, speculator.layer.weight)
    assert SpeculatorConfig.from_pretrained(tmp_path / "saved") == speculator.config

    del written["speculators_model_type"]
    (tmp_path / "saved" / "config.json").write_text(json.dumps(written))
    assert type(Speculator.from_pretrained(tmp_path / "saved")) is module.alphaModel
    (tmp_path / "saved" / "config.json").write_text(json.dumps(written | {"width": 5, "speculators_model_type": "no"}))
    with pytest.raises(CheckpointError, match=r"config.json is not usable: there is no speculator 'no'"):
        SpeculatorConfig.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALGORITHM.format(name="beta"), None),
        ("", r"the entry point beta = own_package_\d of the group verl_speculator.algorithms registers no .*'beta'"),
        ("1 / 0", r"the entry point beta = .* cannot be loaded \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_another_packages_algorithm(tmp_path, monkeypatch, text, message, request) -> None:
    module = f"own_package_{request.node.callspec.indices['text']}"
    (tmp_path / f"{module}.py").write_text(text)
    info = tmp_path / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[verl_speculator.algorithms]\nbeta = {module}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    if message is None:
        assert Speculator.get_class("beta").__name__ == "betaModel"
        assert "beta" in config_module.algorithm_names()
    else:
        with pytest.raises(ConfigError, match=message):
            Speculator.get_class("beta")


def test_a_name_is_taken_once() -> None:
    register_config("gamma")
    with pytest.raises(ConfigError, match=r"'gamma' is registered already, by .*gammaConfig: choose another name"):
        register_config("gamma")
    Speculator.register("gamma")(make_model())
    with pytest.raises(ConfigError, match=r"'gamma' has a model already, .*\.Model: choose another name"):
        Speculator.register("gamma")(make_model())


def test_a_model_without_its_configuration() -> None:
    with pytest.raises(ConfigError, match=r"has no configuration: put @SpeculatorConfig.register\('delta'\)"):
        Speculator.register("delta")(make_model())


def test_a_configuration_without_its_model() -> None:
    register_config("delta")
    with pytest.raises(ConfigError, match=r"has a configuration, deltaConfig, and no model: put @Speculator.register"):
        Speculator.get_class("delta")


def test_a_configuration_that_does_not_say_its_name() -> None:
    with pytest.raises(ConfigError, match=r"must have speculators_model_type: str = 'epsilon', not ''"):
        SpeculatorConfig.register("epsilon")(type("Silent", (SpeculatorConfig,), {}))


@pytest.mark.parametrize("without", ["forward", "from_training_args", "get_trainer_kwargs"])
def test_a_class_without_a_method(without) -> None:
    register_config("zeta")
    with pytest.raises(ConfigError, match=rf"'zeta': Model must define {without}\.$"):
        Speculator.register("zeta")(make_model(without))


def test_what_is_missing_is_named_together() -> None:
    register_config("eta")
    with pytest.raises(ConfigError, match=r"Model must define from_training_args, get_trainer_kwargs\.$"):
        Speculator.register("eta")(make_model("from_training_args", "get_trainer_kwargs"))
    with pytest.raises(ConfigError, match=r"Chain must define embed, init_std, step\.$"):
        Speculator.register("eta")(type("Chain", (ChainSpeculator,), {}))
    with pytest.raises(ConfigError, match="must be a subclass of Speculator"):
        Speculator.register("eta")(nn.Linear)  # type: ignore[type-var]


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"there is no speculator 'eagel3'; did you mean 'eagle3'\?"):
        Speculator.get_class("eagel3")
    with pytest.raises(ConfigError, match=r"there is no speculator 'xyz'; there are .*lstm, .*mlp"):
        Speculator.get_class("xyz")
    with pytest.raises(ConfigError, match=r"'mlp' is a MLPSpeculator, not a ArcticLSTMSpeculator"):
        ArcticLSTMSpeculator.get_class("mlp")
