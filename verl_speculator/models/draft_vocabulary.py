"""The tokens that a speculator can draft, where these are fewer than its base model has.

Its vocabulary matrices then have a row for each of these tokens only, while embeddings read any token. Files hold the
tokens as `d2t` [V'], int64, as Speculators and vLLM do: draft id i stands for the base's token `i + d2t[i]`. They
ascend, so that the draft id of a token is found by bisection. A run is given them as `t2d` [V], bool: true for the
tokens that can be drafted.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from verl_speculator.errors import CheckpointError, ConfigError, MissingFileError
from verl_speculator.models.speculator import Speculator

if TYPE_CHECKING:
    _Base = Speculator
else:
    _Base = object


class DraftVocabulary(_Base):
    """Stands before `Speculator` among the base classes of a model that may have a draft vocabulary."""

    # Not to be looked at by those who only want to know what is drafted: the methods below tell.
    d2t: Tensor | None

    def make_draft_vocabulary(self, size: int | None) -> None:
        """Have one of `size` tokens, those of the lowest ids until others are set or loaded; None for all tokens."""
        self.register_buffer("d2t", None if size is None else torch.zeros(size, dtype=torch.long))

    @property
    def draft_ids(self) -> Tensor | None:
        """The base's id of each token that can be drafted [V'], ascending; None where these are all."""
        return None if self.d2t is None else self.d2t + torch.arange(self.d2t.shape[0], device=self.d2t.device)

    def set_draft_ids(self, ids: Tensor) -> None:
        """Draft these tokens of the base: [V'], ascending."""
        assert self.d2t is not None
        self.d2t.copy_(ids - torch.arange(ids.shape[0], device=ids.device))

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        """The base's ids, of any shape, of tokens of the draft vocabulary."""
        return draft_ids if self.d2t is None else draft_ids + self.d2t[draft_ids]

    def to_draft_ids(self, tokens: Tensor) -> Tensor:
        """Where tokens of the base, of any shape, stand in the draft vocabulary; -1 for those that are not in it."""
        ids = self.draft_ids
        if ids is None:
            return tokens
        ids = ids.to(tokens.device)
        at = torch.searchsorted(ids, tokens).clamp(max=ids.shape[0] - 1)
        return torch.where(ids[at] == tokens, at, -1)

    def to_target_logits(self, logits: Tensor) -> Tensor:
        """Logits over the base's vocabulary [..., V] from those of the draft vocabulary; -inf for all other tokens."""
        ids = self.draft_ids
        if ids is None:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.config.vocab_size), float("-inf"))
        return full.index_copy_(-1, ids, logits)

    def check_loaded(self, tensors: Mapping[str, Tensor], source: str) -> None:
        super().check_loaded(tensors, source)
        if "d2t" in tensors:
            ids = tensors["d2t"] + torch.arange(len(tensors["d2t"]), device=tensors["d2t"].device)
            if ids[0] < 0 or ids[-1] >= self.config.vocab_size or bool((ids.diff() <= 0).any()):
                raise CheckpointError(
                    f"{source} is not usable: d2t must lead to ascending token ids below {self.config.vocab_size}."
                )


def given_draft_ids(size: int | None, t2d: Tensor | None, path: str | None, vocab_size: int) -> Tensor | None:
    """The tokens to draft [V'], from a run's settings; None for all.

    Args:
        size: `draft_vocab_size`.
        t2d: [V], bool; instead of `path`.
        path: `draft_vocab_path`.
        vocab_size: V.

    Raises:
        ConfigError: They do not agree with each other or with the base; the message begins with the key.
        MissingFileError: There is no such file.
    """
    if t2d is None and path is not None:
        t2d = read_t2d(path)
    if t2d is None:
        if size not in (None, vocab_size):
            raise ConfigError("draft_vocab_size needs draft_vocab_path, which says which tokens these are.")
        return None
    if t2d.shape != (vocab_size,):
        raise ConfigError(f"draft_vocab_path must hold one boolean for each of {vocab_size} tokens.")
    ids = t2d.nonzero().squeeze(1)
    if size not in (None, ids.shape[0]) or not ids.shape[0]:
        raise ConfigError(f"draft_vocab_size is {size} and draft_vocab_path has {ids.shape[0]} tokens.")
    return ids


def read_t2d(path: str) -> Tensor:
    """[V], bool, from a `.npy` file such as Speculators' `t2d.npy`; errors are those of `draft_vocab_path`."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingFileError(f"draft_vocab_path: there is no file {path!r}")
    numpy: Any = importlib.import_module("numpy")
    try:
        return torch.from_numpy(numpy.load(file)).bool()
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"draft_vocab_path: {path!r} is no .npy file of booleans ({error})") from error
