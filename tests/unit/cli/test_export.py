"""`verl-speculator export` from its command line."""

from verl_speculator import cli


def test_export_says_what_it_wrote(make_speculator, tmp_path, capsys) -> None:
    _, folder = make_speculator("mlp")
    assert cli.main(["export", "--format", "ibm", str(folder), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith(f"Wrote {tmp_path / 'out'} (config.json, model.safetensors")
    assert cli.main(["export", "--format", "ibm", str(folder), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
