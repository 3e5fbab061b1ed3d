"""Looking at a base model's folder before anything of it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open

from verl_speculator.errors import ConfigError, MissingFileError

# In the order in which transformers looks for them.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class BaseSizes(NamedTuple):
    """What `config.json` says; None where it does not say it."""

    hidden_size: int
    vocab_size: int
    num_layers: int | None
    num_attention_heads: int | None
    num_key_value_heads: int | None
    # None too for a mixture of experts, whose layers may all be experts.
    intermediate_size: int | None


# How a mixture of experts is told from a dense model.
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


def check_base_model(model: DictConfig) -> BaseSizes | None:
    """The sizes of the base model in the folder `model.path`.

    None where they cannot be known here: a name on the Hugging Face hub, a remote path, an unusual `config.json`.

    Raises:
        MissingFileError: the folder, its `config.json` or its weights are not there.
        ConfigError: one of them is damaged, or the model has no chat template.
    """
    name = str(model.path)
    folder = Path(name)
    if not folder.exists():
        if _could_be_elsewhere(name):
            return None
        raise MissingFileError(f"model.path: there is no folder {name!r}; give a Hugging Face model's folder or name")
    if not (folder / "config.json").is_file():
        raise MissingFileError(f"model.path: {name!r} has no config.json; a Hugging Face model folder is needed")
    base = _read_json(folder / "config.json")
    _check_weights(folder)
    _check_chat_template(folder, model)
    text_config = base.get("text_config")
    base = text_config if isinstance(text_config, dict) else base
    if "hidden_size" not in base or "vocab_size" not in base:
        return None
    heads = base.get("num_attention_heads")
    return BaseSizes(
        hidden_size=base["hidden_size"],
        vocab_size=base["vocab_size"],
        num_layers=base.get("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=base.get("num_key_value_heads") or heads,
        intermediate_size=None if any(base.get(key) for key in _EXPERT_KEYS) else base.get("intermediate_size"),
    )


def _could_be_elsewhere(name: str) -> bool:
    """`scheme://...` or `organisation/model`."""
    return "://" in name or (name.count("/") == 1 and not name.startswith(("/", "./", "../", "~")))


def _check_weights(folder: Path) -> None:
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise MissingFileError(
            f"model.path: {str(folder)!r} has no weights; model.safetensors or pytorch_model.bin is needed, "
            "or the index of one in parts"
        )
    parts = [found]
    if found.suffix == ".json":
        weight_map = _read_json(found).get("weight_map")
        parts = [folder / part for part in sorted(set(weight_map.values()))] if isinstance(weight_map, dict) else []
    for part in parts:
        if not part.is_file():
            raise MissingFileError(f"model.path: {str(part)!r} is missing, which {found.name} names: download it again")
        if part.suffix == ".safetensors":
            _check_safetensors(part)


def _check_safetensors(file: Path) -> None:
    """Its header says how long the file must be; the tensors are not read."""
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"model.path: {str(file)!r} is cut short or no safetensors file ({error}): download it again"
        ) from error


def _check_chat_template(folder: Path, model: DictConfig) -> None:
    tokenizer = Path(str(model.tokenizer_path)) if model.tokenizer_path is not None else folder
    settings = tokenizer / "tokenizer_config.json"
    if model.custom_chat_template is not None or not settings.is_file():
        return
    if "chat_template" not in _read_json(settings) and not any(tokenizer.glob("*chat_template*")):
        raise ConfigError(
            f"model.path: the tokenizer in {str(tokenizer)!r} has no chat template; "
            "use an instruction-tuned model or set model.custom_chat_template"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"model.path: {str(file)!r} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"model.path: {str(file)!r} must hold a JSON object")
    return values
