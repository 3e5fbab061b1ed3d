"""Windows: a context, one draft, and what the target made of it; the rows that a scorer learns from.

A parquet file has one row a window, with the fields of `Window` as columns. The names of the scalars stand in the
file's metadata, under `scalars`, with what else the run that wrote it has to say.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl_speculator.errors import DataError, MissingFileError

ACCEPT, REJECT, UNKNOWN = 1, 0, -1


@dataclass(frozen=True)
class Window:
    """k drafts after a context, cut where the target or the draft ends the text: every mismatch may be decided.

    Attributes:
        input_ids: Context and drafts, without padding: `draft_start_idx + k` tokens.
        draft_start_idx: Where the drafts begin, the length of the context.
        prompt_length: Tokens of the prompt, with which the context begins.
        target_ids: k + 1: what the target would have written at each draft, and after the last one.
        scalars: k rows of the scalars, in the order of the file's metadata (`features.draft_scalars`).
        prompt_index: Which prompt of the data this is an answer to; its windows lie side by side.
        answer: The reference answer.
        strict_correct: Whether strict decoding answers rightly.
        strict_calls: Target calls that strict decoding takes for the whole answer, the prompt's included.
        labels: k: 1 if the target, going on after the draft, gives the answer that strict decoding gives; 0 if it gives
            another, -1 where that is not known. `scorer label` looks at the mismatches up to the first that is harmful.
        correct: k: whether it then gives the reference answer, 1 or 0, for every mismatch; -1 elsewhere.
    """

    input_ids: list[int]
    draft_start_idx: int
    prompt_length: int
    target_ids: list[int]
    scalars: list[list[float]]
    prompt_index: int
    answer: str
    strict_correct: bool
    strict_calls: int
    labels: list[int]
    correct: list[int]

    @property
    def drafts(self) -> list[int]:
        return self.input_ids[self.draft_start_idx :]

    @property
    def mismatches(self) -> list[int]:
        """Slots of the draft that differ from the target's choice."""
        return [slot for slot, pair in enumerate(zip(self.drafts, self.target_ids, strict=False)) if pair[0] != pair[1]]


@dataclass(frozen=True)
class WindowFile:
    windows: list[Window]
    scalars: tuple[str, ...]
    info: dict[str, Any]


_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("draft_start_idx", pa.int32()),
        ("prompt_length", pa.int32()),
        ("target_ids", pa.list_(pa.int32())),
        ("scalars", pa.list_(pa.list_(pa.float32()))),
        ("prompt_index", pa.int32()),
        ("answer", pa.string()),
        ("strict_correct", pa.bool_()),
        ("strict_calls", pa.int32()),
        ("labels", pa.list_(pa.int8())),
        ("correct", pa.list_(pa.int8())),
    ]
)


def write_windows(path: str | Path, windows: Sequence[Window], scalars: Sequence[str], info: dict[str, Any]) -> None:
    """`info` is kept beside the rows: models, number of drafts, counts."""
    metadata = {"scalars": json.dumps(list(scalars)), "info": json.dumps(info)}
    schema = _SCHEMA.with_metadata(metadata)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([asdict(window) for window in windows], schema=schema), path)


def read_windows(path: str | Path) -> WindowFile:
    """Raises MissingFileError or DataError for what `write_windows` has not written."""
    if not Path(path).is_file():
        raise MissingFileError(f"there is no file {str(path)!r}; `verl-speculator scorer data` writes windows")
    table = pq.read_table(path)
    metadata = table.schema.metadata or {}
    missing = [field.name for field in fields(Window) if field.name not in table.column_names]
    if missing or b"scalars" not in metadata:
        raise DataError(f"{str(path)!r} holds no windows ({', '.join(missing) or 'its metadata'} missing)")
    windows = [Window(**row) for row in table.select([field.name for field in fields(Window)]).to_pylist()]
    return WindowFile(windows, tuple(json.loads(metadata[b"scalars"])), json.loads(metadata[b"info"]))
