"""Cutting an output's text by who brought each token: the draft or the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what a tokenizer makes of the first bytes of a character

Piece = tuple[str, int, bool]


def output_pieces(tokenizer: Any, tokens: Sequence[int], accepted_per_round: Sequence[int]) -> list[Piece]:
    """`(text, round, was drafted)` of each run of tokens; joined, the texts are the text of `tokens`.

    Round 0 is the prompt's own forward, which brings the first token. Every other brings the drafts that it accepts and
    one token of the target's; of the last round, tokens past the end are not there. A character whose bytes come from
    several runs is shown in the one that completes it.
    """
    pieces: list[Piece] = []
    shown = 0
    for start, end, round_number, is_draft in _runs(len(tokens), accepted_per_round):
        text = tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False)
        # What is decoded is always a beginning of the whole: a token's text may depend on those before it.
        complete = len(text) if end == len(tokens) else len(text.rstrip(_INCOMPLETE))
        if complete > shown and end > start:
            pieces.append((text[shown:complete], round_number, is_draft))
            shown = complete
    return pieces


def _runs(num_tokens: int, accepted_per_round: Sequence[int]) -> list[tuple[int, int, int, bool]]:
    runs, position = [(0, min(1, num_tokens), 0, False)], 1
    for number, accepted in enumerate(accepted_per_round, start=1):
        for length, is_draft in ((accepted, True), (1, False)):
            end = min(position + length, num_tokens)
            if end > position:
                runs.append((position, end, number, is_draft))
            position = end
    return runs
