"""Rows that are tokens already: a target's own, as it wrote them. Text would have to be rendered again, and that loses.

A file of them is parquet with the columns of `SCHEMA`. What says whose they are stands in every row, and not in the
file's metadata: rows then stay what they are when files are put together. It costs nothing, being the same all along.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pyarrow as pa

from verl_speculator.errors import DataError

INPUT_IDS, LOSS_MASK, TOKENIZER, ORIGIN = "input_ids", "loss_mask", "tokenizer", "origin"

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # of the chat that was answered, counted over all files
        ("sample", pa.int32()),  # which of several answers to it
        (INPUT_IDS, pa.list_(pa.int32())),
        (LOSS_MASK, pa.list_(pa.int8())),  # 1 on the tokens that the target wrote
        (TOKENIZER, pa.string()),  # `tokenizer_fingerprint`
        (ORIGIN, pa.string()),  # JSON: how they came about
    ]
)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """What token ids mean: of the vocabulary alone, so that another chat template reads the same rows."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


def holds_tokens(columns: list[str]) -> bool:
    """Whether a file with these columns holds tokens, and not only chats."""
    return {INPUT_IDS, LOSS_MASK} <= set(columns)


def check_token_columns(schema: pa.Schema, where: str) -> None:
    """Raise `DataError` unless the columns of a token file have the types that they must have."""
    for name in (INPUT_IDS, LOSS_MASK):
        kind = schema.field(name).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not (
            pa.types.is_integer(kind.value_type) or pa.types.is_boolean(kind.value_type)
        ):
            raise DataError(f"{where}: column {name!r} must hold lists of integers, not {kind}")
    if TOKENIZER not in schema.names:
        raise DataError(
            f"{where} holds tokens and has no column {TOKENIZER!r} that says whose: `verl-speculator regenerate` "
            "writes it, and `verl_speculator.data.token_rows.tokenizer_fingerprint` makes its value"
        )


def check_token_row(row: dict[str, Any], fingerprint: str, vocab_size: int, where: str) -> None:
    """Raise `DataError` unless the row can be trained on as it is, with the tokenizer of that fingerprint."""
    if row[TOKENIZER] != fingerprint:
        base = json.loads(row.get(ORIGIN) or "{}").get("base")
        raise DataError(
            f"{where}, holds tokens of another tokenizer{f' (that of {base!r})' if base else ''}: they mean other text "
            "to this base, so let it answer the prompts itself with `verl-speculator regenerate`"
        )
    ids, mask = row[INPUT_IDS], row[LOSS_MASK]
    if not ids or mask is None or len(ids) != len(mask):
        raise DataError(
            f"{where}, must have as many entries in {LOSS_MASK!r} as in {INPUT_IDS!r}, and at least one: "
            f"they have {len(mask or [])} and {len(ids or [])}"
        )
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise DataError(f"{where}, has tokens outside of the {vocab_size} of the tokenizer")
