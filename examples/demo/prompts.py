"""The demo's prompts: functions of the Python standard library to be written, each given by signature and docstring.

    python -m examples.demo.prompts FOLDER       # train.parquet, val.parquet, test.parquet with a `messages` column

Whole modules go to one split, decided by a hash of the module's name: the held-out prompts come from modules that the
speculator has not been trained on. The repository ships what Python 3.11 gives, since each release's library differs.
"""

import ast
import hashlib
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

SPLITS = ("train", "val", "test")

# Not library code (tests, demos), or not the standard library at all.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
    | {"lib-dynload", "site-packages", "dist-packages", "__pycache__"}
)
# A body of one short line (`return self._x`) is hardly a task, and a very long one more than a small model can write.
BODY_CHARS = range(60, 1001)
MAX_REQUEST_CHARS = 700
PERCENT_HELD_OUT = 4  # of the modules, for `val` and for `test` each


@dataclass(frozen=True)
class FunctionExample:
    """One function of the library; `signature + body` is valid Python. A prompt shows no body."""

    module: str
    name: str
    signature: str
    summary: str
    body: str

    @property
    def request(self) -> str:
        return f'Write this Python function.\n\n```python\n{self.signature}\n    """{self.summary}"""\n```'

    def as_row(self) -> dict[str, object]:
        messages = [{"role": "user", "content": self.request}]
        return {"module": self.module, "name": self.name, "messages": messages}


def stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def iter_source_files(root: Path) -> Iterator[Path]:
    """The library's Python files below `root`, sorted so that every run sees the same order."""
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            yield path


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def split_of(module: str) -> str:
    """The split of a module, the same on every machine and in every run."""
    bucket = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big") % 100
    if bucket < PERCENT_HELD_OUT:
        return "test"
    return "val" if bucket < 2 * PERCENT_HELD_OUT else "train"


def extract_functions(source: str, module: str) -> Iterator[FunctionExample]:
    """The documented functions and methods in `source`, with docstring and body apart.

    The code is printed back from its syntax tree: signatures have one layout, whoever wrote them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules are not the demo's business
        tree = ast.parse(source)
    for owner, node in _functions_with_owner(tree):
        summary = (ast.get_docstring(node) or "").partition("\n\n")[0].strip().replace('"""', "'''")
        if not summary or len(node.body) < 2:
            continue
        body = "\n".join(_indent(ast.unparse(statement)) for statement in node.body[1:])
        node.body, node.decorator_list = [ast.Pass()], []
        signature = ast.unparse(node).removesuffix("\n    pass")
        name = f"{owner}.{node.name}" if owner else node.name
        yield FunctionExample(module, name, signature, summary, body)


def _functions_with_owner(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield "", node
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield node.name, member


def _indent(code: str) -> str:
    return "\n".join("    " + line if line else line for line in code.split("\n"))


def collect_examples(root: Path, limit: int | None = None) -> list[FunctionExample]:
    """All usable functions below `root`, each prompt once; `limit` keeps the first in an order unrelated to names."""
    examples: dict[str, FunctionExample] = {}
    for path in iter_source_files(root):
        try:
            source = path.read_text(encoding="utf-8")
            functions = list(extract_functions(source, module_name(root, path)))
        except (UnicodeDecodeError, SyntaxError):
            continue  # a few files hold other encodings or syntax of other versions on purpose
        for example in functions:
            if len(example.body) in BODY_CHARS and len(example.request) <= MAX_REQUEST_CHARS:
                # The same prompt in a held-out module would be one whose answer was trained on.
                examples.setdefault(example.request, example)
    ordered = sorted(examples.values(), key=lambda e: hashlib.sha256(e.body.encode()).digest())
    return ordered[:limit]


def write_splits(examples: Iterable[FunctionExample], folder: Path) -> dict[str, int]:
    """Write `train.parquet`, `val.parquet` and `test.parquet` with a `messages` column; returns rows per split."""
    rows: dict[str, list[dict[str, object]]] = {split: [] for split in SPLITS}
    for example in examples:
        rows[split_of(example.module)].append(example.as_row())
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        pd.DataFrame(rows[split], columns=["module", "name", "messages"]).to_parquet(folder / f"{split}.parquet")
    return {split: len(rows[split]) for split in SPLITS}


if __name__ == "__main__":
    print(write_splits(collect_examples(stdlib_root()), Path(sys.argv[1])))
