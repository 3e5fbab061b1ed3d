"""Writing a speculator as other engines, or the Hugging Face hub, want it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from verl_speculator.errors import CheckpointError, ConfigError
from verl_speculator.models import Speculator
from verl_speculator.models.serialization import PREFIX, read_config, read_weights, write_folder
from verl_speculator.serving.export_formats import EXPORT_FORMATS, ExportFormat, with_full_vocabulary
from verl_speculator.serving.hub import CardFacts, model_card

HUB = "hf"
# Algorithms whose authors have a form of their own.
NATIVE = ("eagle3", "dflash")
FORMATS = (*EXPORT_FORMATS, HUB, *NATIVE)


def export_speculator(
    source: str | Path,
    destination: str | Path,
    export_format: str,
    base_architecture: str | None = None,
    card: CardFacts | None = None,
) -> Path:
    """Write the speculator in `source` to the new folder `destination`; returns that folder.

    `arctic` is for Arctic Inference, `ibm` for engines that read IBM's speculators, `hf` for the Hugging Face hub and
    for vLLM with this package, `eagle3` and `dflash` are the forms of these algorithms' own repositories. What was
    written is read back and compared with what the engine will look for.

    Args:
        base_architecture: such as `LlamaForCausalLM`; Arctic Inference compares it with the base model. None takes it
            from the speculator's or its base model's `config.json`.
        card: What the model card of `hf` says beside what the speculator's files hold.

    Raises:
        ConfigError: the engine cannot serve this configuration, or `destination` is not empty.
        CheckpointError: `source` is damaged, or what was written is not what the engine needs.
    """
    folder = Path(destination)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already: name a new folder for the export.")
    if export_format not in FORMATS:
        raise ConfigError(f"--format must be one of {', '.join(FORMATS)}, not {export_format!r}.")
    speculator = Speculator.from_pretrained(source)
    if export_format == HUB:
        return _export_for_hub(speculator, folder, card or CardFacts())
    if export_format in NATIVE:
        return _export_native(speculator, folder, export_format)
    target = EXPORT_FORMATS[export_format]
    converted = target.convert(with_full_vocabulary(speculator))
    values = target.config_for(converted.config)
    if export_format == "arctic":
        values["base_model_archs"] = _base_architectures(speculator, base_architecture)
    tensors = {target.prefix + name: tensor for name, tensor in converted.export_state_dict().items()}
    write_folder(folder, values, tensors)
    check_export(folder, target)
    return folder


def check_export(folder: Path, target: ExportFormat) -> None:
    """Raise a CheckpointError unless the files in `folder` hold exactly what the engine of `target` looks for."""
    values = read_config(folder / "config.json")
    if len(values["top_k_tokens_per_head"]) != values["n_predict"]:
        raise CheckpointError(f"{folder}/config.json: {target.engine} wants a top_k_tokens_per_head for each head.")
    file, tensors, _ = read_weights(folder)
    expected = target.shapes_for(values)
    found = {name.removeprefix(PREFIX): tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"no {name}" for name in expected if name not in found]
    problems += [f"{name}, which it does not know" for name in found if name not in expected]
    problems += [
        f"{name} {list(shape)} instead of {list(expected[name])}"
        for name, shape in found.items()
        if shape != expected.get(name, shape)
    ]
    if problems:
        raise CheckpointError(f"{file} is not what {target.engine} reads: {'; '.join(problems[:5])}.")


def _base_architectures(speculator: Speculator, given: str | None) -> list[str]:
    if given is not None:
        return [given]
    if speculator.config.base_model_archs:
        return speculator.config.base_model_archs
    config_file = Path(speculator.config.base_model_name_or_path) / "config.json"
    if speculator.config.base_model_name_or_path and config_file.is_file():
        architectures = json.loads(config_file.read_text(encoding="utf-8")).get("architectures")
        if architectures:
            return list(architectures)
    raise ConfigError(
        "Arctic Inference wants to know the base model's architecture, which the speculator's config.json does not "
        "say: name it with --base-architecture, such as --base-architecture LlamaForCausalLM."
    )


def _export_native(speculator: Speculator, folder: Path, algorithm: str) -> Path:
    if not isinstance(speculator, Speculator.get_class(algorithm)):
        raise ConfigError(f"--format {algorithm} is for that algorithm, not for a {type(speculator).__name__}.")
    native: Any = speculator
    values, tensors = native.native_form()
    write_folder(folder, values, tensors, pytorch_bin=False)
    _, written, _ = read_weights(folder)
    if written.keys() != tensors.keys() or any(not torch.equal(written[name], tensors[name]) for name in tensors):
        raise CheckpointError(f"{folder} does not read back as it was written: check the file system and export again.")
    return folder


def _export_for_hub(speculator: Speculator, folder: Path, facts: CardFacts) -> Path:
    card = model_card(speculator, facts)
    speculator.save_pretrained(folder, pytorch_bin=False)  # the hub warns of pickles, and safetensors is what is read
    (folder / "README.md").write_text(card, encoding="utf-8")
    again = Speculator.from_pretrained(folder)
    state = speculator.state_dict()
    if any(not torch.equal(state[name], tensor) for name, tensor in again.state_dict().items()):
        raise CheckpointError(f"{folder} does not read back as it was written: check the file system and export again.")
    return folder
