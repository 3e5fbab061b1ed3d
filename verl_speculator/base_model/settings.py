"""How a base model is to be loaded. Nothing heavy is imported here: flags are checked before torch is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from verl_speculator.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "sequential")


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """Each field is the flag of the same name of `verl-speculator eval` and `regenerate`.

    Attributes:
        dtype: "auto" is float32 on a CPU, where greedy decoding is then exact, and the base's own type elsewhere.
        device: "auto" is the machine's accelerator if it has one.
        device_map: How layers are spread over all accelerators, in accelerate's words. None does so, as "auto", only
            where there are several and the base does not fit on one.
        revision: A branch, tag or commit of a name on the hub; None is the newest.
        trust_remote_code: Run Python code that comes with the base.
        attn_implementation: In transformers' words, such as "eager" or "flash_attention_2"; None leaves it to it.
        quantization: Handed on as transformers' `quantization_config`, a mapping or its JSON, such as {"quant_method":
            "bitsandbytes", "load_in_4bit": true}; None loads the weights as they are. On accelerators only.

    Raises:
        ConfigError: A value that cannot work; the message names its flag.
    """

    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    quantization: Mapping[str, Any] | str | None = None

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, DTYPES)
        read_quantization(self.quantization)
        if self.device_map is not None:
            require_choice("device_map", self.device_map, DEVICE_MAPS)
            if self.device != "auto":
                raise ConfigError(f"--device-map spreads the base over all devices: leave out --device={self.device}")


def read_quantization(given: Mapping[str, Any] | str | None) -> dict[str, Any] | None:
    """What transformers takes. Raises ConfigError for what is no object that names its method."""
    if given is None:
        return None
    try:
        values = json.loads(given) if isinstance(given, str) else dict(given)
    except ValueError:
        values = None
    if not isinstance(values, dict) or "quant_method" not in values:
        raise ConfigError(
            'quantization must be for transformers, such as {"quant_method": "bitsandbytes", "load_in_4bit": true}, '
            f"not {given!r}"
        )
    return values


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{flag(name)} must be one of {', '.join(choices)}, got {value!r}")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
