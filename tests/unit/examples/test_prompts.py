import ast
import textwrap

import pandas as pd
import pytest

from examples.demo.prompts import (
    SPLITS,
    collect_examples,
    extract_functions,
    iter_source_files,
    module_name,
    split_of,
    stdlib_root,
    write_splits,
)

SOURCE = textwrap.dedent(
    '''
    @decorated
    def documented(a, b=2, *, c: int) -> int:
        """Adds.

        At length.
        """
        # a comment
        if a:
            return (a +
                    b)
        return c

    def undocumented(a):
        return a

    def only_documented():
        """Nothing else."""

    class Owner:
        async def method(self):
            """Waits."""
            await self
    '''
)


def test_functions_become_signature_summary_and_body():
    function, method = extract_functions(SOURCE, "package.module")

    assert (function.name, function.summary) == ("documented", "Adds.")
    assert function.signature == "def documented(a, b=2, *, c: int) -> int:"
    assert function.body == "    if a:\n        return a + b\n    return c"
    assert (method.name, method.signature) == ("Owner.method", "async def method(self):")
    assert method.body == "    await self"


def test_signature_and_body_are_a_function_again():
    function, _ = extract_functions(SOURCE, "package.module")

    tree = ast.parse(f"{function.signature}\n{function.body}")

    assert ast.unparse(tree).endswith("return c")


def test_tests_and_installed_packages_are_not_read(tmp_path):
    for name in ("a/b.py", "a/__init__.py", "test/c.py", "a/tests/d.py", "site-packages/e.py", "idlelib/f.py"):
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    names = [module_name(tmp_path / "lib", path) for path in iter_source_files(tmp_path / "lib")]

    assert names == ["a", "a.b"]


def test_a_folder_named_test_above_the_library_does_not_hide_it(tmp_path):
    library = tmp_path / "test" / "lib"
    library.mkdir(parents=True)
    (library / "a.py").touch()

    assert [path.name for path in iter_source_files(library)] == ["a.py"]


@pytest.fixture
def library(tmp_path):
    """Modules that share one function and each have one of their own."""
    body = "\n".join(f"    value_{i} = compute(argument, {i})" for i in range(5))
    for index in range(60):
        own = f'def own_{index}(argument):\n    """Own."""\n{body}\n    return {index}\n'
        shared = f'def shared(argument):\n    """Shared."""\n{body}\n'
        short = 'def short():\n    """Short."""\n    return 1\n'
        (tmp_path / f"module_{index}.py").write_text(own + shared + short)
    (tmp_path / "broken.py").write_text("def broken(:\n")
    return tmp_path


def test_a_prompt_is_taken_once_and_short_functions_never(library):
    examples = collect_examples(library)

    requests = [example.request for example in examples]
    assert len(requests) == len(set(requests)) == 61
    assert sum(example.name == "shared" for example in examples) == 1
    assert not any(example.name == "short" for example in examples)


def test_two_runs_agree_and_a_limit_takes_a_prefix(library):
    assert collect_examples(library) == collect_examples(library)
    assert collect_examples(library, limit=7) == collect_examples(library)[:7]


def test_no_module_is_in_two_splits(library, tmp_path):
    examples = collect_examples(library)
    counts = write_splits(examples, tmp_path / "data")

    modules = {split: set(pd.read_parquet(tmp_path / "data" / f"{split}.parquet")["module"]) for split in SPLITS}
    assert sum(counts.values()) == len(examples)
    assert all(split_of(module) == split for split in SPLITS for module in modules[split])
    assert not modules["train"] & modules["test"]
    row = pd.read_parquet(tmp_path / "data" / "train.parquet").iloc[0]
    assert [message["role"] for message in row["messages"]] == ["user"]
    assert row["messages"][0]["content"].startswith("Write this Python function.\n\n```python\ndef ")


def test_splits_of_the_real_library_are_large_enough():
    root = stdlib_root()
    modules = [module_name(root, path) for path in iter_source_files(root)]

    shares = {split: sum(split_of(module) == split for module in modules) / len(modules) for split in SPLITS}
    assert len(modules) > 300
    assert shares["train"] > 0.85
    assert shares["test"] > 0.01
