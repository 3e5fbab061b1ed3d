"""The final answer in a text, and whether it is right: for rewards, labels and evaluation alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import pyarrow.parquet as pq

from verl_speculator.errors import ConfigError, DataError

_NUMBER = r"[-+]?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?"
# Ways to end a solution, the most explicit first: GSM8K's, LaTeX's, and a sentence.
_MARKED = (
    re.compile(r"####\s*(\S.*)"),
    re.compile(r"\\boxed\{([^{}]*)\}"),
    re.compile(rf"(?i:answer)\s*(?:is|:|=)?\s*({_NUMBER})"),
)
_ANY_NUMBER = re.compile(_NUMBER)


@dataclass(frozen=True)
class AnswerCheck:
    """How answers are found: by `pattern`, whose first group is the answer, or in the ways that are common.

    Those are `#### 12` as in GSM8K, `\\boxed{12}`, `answer is 12`, else the last number. Of several the last counts.

    Raises:
        ConfigError: `pattern` is no regular expression with a group.
    """

    pattern: str | None = None
    _compiled: re.Pattern[str] | None = field(init=False, default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.pattern is None:
            return
        try:
            compiled = re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"the answer pattern {self.pattern!r} is no regular expression ({error})") from error
        if compiled.groups < 1:
            raise ConfigError(f"the answer pattern {self.pattern!r} needs a group, (...), around the answer")
        object.__setattr__(self, "_compiled", compiled)

    def extract(self, text: str) -> str | None:
        """The answer that `text` gives; None if none can be found in it."""
        if self._compiled is not None:
            groups = [match.group(1) for match in self._compiled.finditer(text)]
            return groups[-1].strip() if groups else None
        for marked in _MARKED:
            if found := marked.findall(text):
                return found[-1].strip()
        numbers = _ANY_NUMBER.findall(text)
        return numbers[-1] if numbers else None

    def reference(self, text: str) -> str:
        """The answer of a reference: what can be extracted from it, or all of it."""
        return self.extract(text) or text.strip()

    def is_correct(self, text: str, reference: str) -> bool | None:
        """Whether `text` gives the answer of `reference`; None if no answer can be extracted from it."""
        given = self.extract(text)
        return None if given is None else same_answer(given, self.reference(reference))


def same_answer(one: str, other: str) -> bool:
    """Numbers by value, anything else letter by letter but for case, spaces and a full stop."""
    values = (_number(one), _number(other))
    if None not in values:
        return values[0] == values[1]
    return _plain(one) == _plain(other)


def _number(text: str) -> Fraction | None:
    try:
        return Fraction(text.strip().rstrip(".").replace(",", "").replace("$", "").replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _plain(text: str) -> str:
    return " ".join(text.lower().strip().rstrip(".").split())


def check_answers(file: str, column: str) -> None:
    """Raises DataError if `file` has no such column."""
    names = pq.read_schema(file).names
    if column not in names:
        raise DataError(f"--answers: {file!r} has no column {column!r}; it has {', '.join(names)}")


def read_answers(files: Sequence[str], column: str) -> dict[tuple[str, int], str]:
    """The reference answer of each row, by file and row. Raises DataError where one is missing."""
    answers = {}
    for file in files:
        for row, answer in enumerate(pq.read_table(file, columns=[column]).column(0).to_pylist()):
            if answer is None or not str(answer).strip():
                raise DataError(f"--answers: {file!r}, row {row} has nothing in {column!r}")
            answers[file, row] = str(answer)
    return answers
