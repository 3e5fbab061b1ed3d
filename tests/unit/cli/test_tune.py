"""What a search is refused for, before Ray or a model is loaded."""

from __future__ import annotations

import pytest

from tests.support.tiny import write_base_model, write_chats
from verl_speculator import cli


@pytest.fixture
def refused(tmp_path, capsys):
    base = write_base_model(tmp_path / "base")
    data = write_chats(tmp_path / "train.parquet", 40)

    def run(*arguments: str) -> str:
        settings = [f"model.partial_pretrain={base}", f"data.train_files={data}"]
        capsys.readouterr()
        assert cli.main(["tune", "--output", str(tmp_path / "out"), *settings, *arguments]) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--grid or --draw must be given"),
        (["--grid", "optim.lr"], "--grid must be KEY=VALUES, got 'optim.lr'"),
        (["--draw", "optim.lr=1e-3"], "--draw optim.lr=1e-3 must be LOW:HIGH"),
        (["--draw", "optim.lr=0.0:1e-3"], "two numbers above 0"),
        (["--draw", "model.speculator.n_predict=5:2"], "must be LOW:HIGH"),
        (["--grid", "optim.lr=1e-3", "--trials", "0"], "--trials must be at least 1, got 0"),
        (["--grid", "optim.lrr=1e-3"], "did you mean optim.lr?"),
        (["--grid", "optim.lr=1e-3,-1"], "optim.lr must be a positive number"),
        (["--grid", "model.speculator.n_predict=2,3"], "data.val_files must be given"),
    ],
)
def test_what_cannot_work_is_said_at_once(refused, arguments, message) -> None:
    assert message in refused(*arguments)
