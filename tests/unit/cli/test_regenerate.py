"""`verl-speculator regenerate` from its command line."""

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl_speculator import cli

CPU = "--device=cpu"


def regenerate(base, data, output, *more: str) -> int:
    return cli.main(["regenerate", "--base", str(base), "--data", str(data), "--output", str(output), *more])


def test_writes_the_base_models_answers(base_model, chat_data, tmp_path, capsys):
    output = tmp_path / "answers.parquet"
    assert regenerate(base_model, chat_data.val, output, "--limit", "3", "--max-new-tokens", "5") == 0
    rows = pq.read_table(output)["messages"].to_pylist()
    before = pq.read_table(chat_data.val)["messages"].to_pylist()[:3]
    assert [row[0] for row in rows] == [row[0] for row in before]
    assert [row[1]["role"] for row in rows] == ["assistant"] * 3

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base_model).eval(),
        AutoTokenizer.from_pretrained(base_model),
    )
    text = tokenizer.apply_chat_template([rows[0][0]], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=5, pad_token_id=0)[
        0, prompt["input_ids"].shape[1] :
    ]
    assert rows[0][1]["content"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert f"{output}: 3 answers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--temperature", "-1"], "--temperature must be 0 (greedy) or more, got -1.0"),
        (
            ["--device-map", "auto", "--device", "cpu"],
            "--device-map spreads the base over all devices: leave out --device=cpu",
        ),
        (["--num-samples", "0"], "--num-samples must be at least 1, got 0"),
        (["--num-samples", "2"], "--num-samples above 1 needs --temperature above 0: greedy answers are all the same"),
        (["--num-engines", "0"], "--num-engines must be at least 1, got 0"),
        (
            ["--tensor-parallel-size", "2", "--backend", "hf"],
            "--tensor-parallel-size is for --backend vllm: leave it out",
        ),
        (
            ["--endpoint", "http://x", "--backend", "hf"],
            "give --backend or --endpoint, not both: the server has an engine of its own",
        ),
        (["--endpoint", "http://x", CPU], "--device is for --backend hf: give that too, or leave it out"),
        (["--chat-template", "absent.jinja"], "--chat-template: there is no file 'absent.jinja'"),
    ],
)
def test_a_mistake_ends_in_one_line(base_model, chat_data, tmp_path, capsys, more, reason):
    assert regenerate(base_model, chat_data.val, tmp_path / "out.parquet", *more) == 2
    assert capsys.readouterr().err == f"error: {reason}\n"


def test_a_folder_that_is_not_there(base_model, chat_data, tmp_path, capsys):
    assert regenerate(base_model, chat_data.val, tmp_path / "absent" / "out.parquet") == 2
    assert "--output: there is no folder" in capsys.readouterr().err


def test_data_that_is_not_there(base_model, tmp_path, capsys):
    assert regenerate(base_model, tmp_path / "absent.parquet", tmp_path / "out.parquet") == 2
    assert capsys.readouterr().err.startswith("error: --data:")


def test_settings_of_the_template_are_json(base_model, chat_data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        regenerate(base_model, chat_data.val, tmp_path / "out.parquet", "--chat-template-kwargs", "[1]")
    assert "argument --chat-template-kwargs: must be a JSON object, got '[1]'" in capsys.readouterr().err


def test_vllm_where_it_is_not_installed(base_model, chat_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert regenerate(base_model, chat_data.val, tmp_path / "out.parquet", "--backend", "vllm") == 2
    assert capsys.readouterr().err.startswith("error: --backend vllm needs vLLM: pip install 'verl_speculator[vllm]'")
