"""Looking at a base model's folder before anything of it is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from verl_speculator.errors import ConfigError, MissingFileError

# In the order in which transformers looks for them.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# How a mixture of experts is told from a dense model.
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")

# Of a file, for its fingerprint: how many samples of how many bytes.
_SAMPLES, _SAMPLE_SIZE = 16, 1 << 14


class BaseSizes(NamedTuple):
    """What `config.json` says; None where it does not say it."""

    hidden_size: int
    vocab_size: int
    num_layers: int | None
    num_attention_heads: int | None
    num_key_value_heads: int | None
    # None too for a mixture of experts, whose layers may all be experts.
    intermediate_size: int | None
    model_type: str | None = None
    tie_word_embeddings: bool = False


def check_base_files(
    name: str,
    *,
    key: str,
    template_key: str,
    tokenizer_path: str | None = None,
    has_template: bool = False,
) -> BaseSizes | None:
    """The sizes of the base model in the folder `name`, if all that loading it takes is there.

    Args:
        name: A folder, or what is not here: a name on the Hugging Face hub, a remote path.
        key: The configuration key or flag that names the base; errors begin with it.
        template_key: The one that gives a chat template where the tokenizer has none.
        tokenizer_path: The folder of the tokenizer, if it is not the base's.
        has_template: A chat template is given, so that the tokenizer needs none.

    Returns:
        None where the sizes cannot be known here: the base is elsewhere, or its `config.json` is an unusual one.

    Raises:
        MissingFileError: The folder, its `config.json` or its weights are not there.
        ConfigError: One of them is damaged, or the tokenizer has no chat template.
    """
    folder = Path(name)
    if not folder.exists():
        if "://" in name or is_hub_name(name):
            return None
        raise MissingFileError(f"{key}: there is no folder {name!r}; give a Hugging Face model's folder or name")
    if not (folder / "config.json").is_file():
        raise MissingFileError(f"{key}: {name!r} has no config.json; a Hugging Face model folder is needed")
    sizes = read_base_sizes(name, key=key)
    _check_weights(folder, key)
    tokenizer = folder if tokenizer_path is None else Path(tokenizer_path)
    settings = tokenizer / "tokenizer_config.json"
    if has_template or not settings.is_file() or any(tokenizer.glob("*chat_template*")):
        return sizes
    # Older tokenizers keep their template among their settings.
    if "chat_template" not in _read_json(settings, key):
        raise ConfigError(
            f"{key}: the tokenizer in {str(tokenizer)!r} has no chat template; "
            f"use an instruction-tuned model or set {template_key}"
        )
    return sizes


def is_hub_name(name: str) -> bool:
    """Whether it has the form `organisation/model`, which a folder's name can have too."""
    return name.count("/") == 1 and "://" not in name and not name.startswith(("/", "./", "../", "~"))


def read_base_sizes(name: str, *, key: str) -> BaseSizes | None:
    """The sizes that the `config.json` in a base's folder states; None where there is none, or it has no such entries.

    Raises:
        ConfigError: The file is damaged; the message begins with `key`.
    """
    file = Path(name) / "config.json"
    if not file.is_file():
        return None
    values = _read_json(file, key)
    # Of a model that sees or hears, the part that writes.
    text_config = values.get("text_config")
    values = text_config if isinstance(text_config, dict) else values
    hidden_size, vocab_size = values.get("hidden_size"), values.get("vocab_size")
    if not isinstance(hidden_size, int) or not isinstance(vocab_size, int):
        return None
    heads = values.get("num_attention_heads")
    return BaseSizes(
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_layers=values.get("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads") or heads,
        intermediate_size=None if any(values.get(name) for name in _EXPERT_KEYS) else values.get("intermediate_size"),
        model_type=values.get("model_type"),
        tie_word_embeddings=values.get("tie_word_embeddings") is True,
    )


def fingerprint_base(name: str) -> str | None:
    """Of the weights in a base's folder; None where there are none: a name on a hub, a remote path."""
    # As transformers prefers them. A folder has both forms at times, and an adapter's weights are not the base's.
    weights = sorted(Path(name).glob("model*.safetensors")) or sorted(Path(name).glob("pytorch_model*.bin"))
    return fingerprint_files(*weights)


def fingerprint_files(*files: Path) -> str | None:
    """Of sizes and of samples spread over each file, so that large files need not be read; None for no files."""
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file():
            return None
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            for index in range(_SAMPLES):
                # The first sample has the head of a safetensors file, the last one the foot of a parquet file.
                stream.seek(max(size - _SAMPLE_SIZE, 0) * index // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_SIZE))
    return digest.hexdigest() if files else None


def _check_weights(folder: Path, key: str) -> None:
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise MissingFileError(
            f"{key}: {str(folder)!r} has no weights; model.safetensors or pytorch_model.bin is needed, "
            "or the index of one in parts"
        )
    parts = [found]
    if found.suffix == ".json":
        weight_map = _read_json(found, key).get("weight_map")
        parts = [folder / part for part in sorted(set(weight_map.values()))] if isinstance(weight_map, dict) else []
    for part in parts:
        if not part.is_file():
            raise MissingFileError(f"{key}: {str(part)!r} is missing, which {found.name} names: download it again")
        if part.suffix == ".safetensors":
            try:
                # Its header says how long the file must be; the tensors are not read.
                with safe_open(part, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ConfigError(
                    f"{key}: {str(part)!r} is cut short or no safetensors file ({error}): download it again"
                ) from error


def _read_json(file: Path, key: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{key}: {str(file)!r} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{key}: {str(file)!r} must hold a JSON object")
    return values
