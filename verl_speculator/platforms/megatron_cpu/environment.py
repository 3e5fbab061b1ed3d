"""The variables through which Megatron tells TransformerEngine its choice of attention. Checked with 0.16.1.

Every model sets them, and refuses those that another choice has left, in this process or in the one that started it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


@contextmanager
def no_attention_choice() -> Iterator[None]:
    """Set the variables aside, and put them back as they were."""
    before = {name: os.environ.pop(name, None) for name in ATTENTION_VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
