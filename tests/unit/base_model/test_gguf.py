"""GGUF files, written here by llama.cpp's own writer, against the model they were made from."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.tiny import write_base_model
from verl_speculator import cli
from verl_speculator.base_model.gguf import convert_gguf

EOS, EOT, PAD, BOS = 2, 1, 0, 1
ENDS = {"bos_token_id": BOS, "eos_token_id": EOS, "padding_token_id": PAD}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("gguf") / "llama", family="llama", tie=False)


def write_gguf(base: Path, file: Path, special: dict[str, int]) -> Path:
    """`base` in llama.cpp's names: its rotary embedding wants the rows of q and k interleaved, half by half."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(base)
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    specials = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token or f"<unused{i}>" for i, token in enumerate(tokens)])
    writer.add_token_types([3 if token in specials else 1 for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_chat_template(tokenizer.chat_template)
    for name, token in special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}", token)
    names = {
        "embed_tokens": "token_embd",
        "lm_head": "output",
        "norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "o_proj": "attn_output",
        **{f"{part}_proj": f"attn_{part}" for part in "qkv"},
        **{f"{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    }
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        block = f"blk.{parts[2]}." if "layers" in parts else ""
        if parts[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if parts[-2] == "q_proj" else config.num_key_value_heads
            tensor = tensor.reshape(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{block}{names[parts[-2]]}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_the_folder_is_the_model_it_was_made_from(llama, tmp_path, capsys) -> None:
    file = write_gguf(llama, tmp_path / "tiny.gguf", ENDS)
    folder = tmp_path / "converted"
    assert cli.main(["base", "from-gguf", str(file), str(folder)]) == 0
    assert str(folder) in capsys.readouterr().out

    original, converted = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (llama, folder))
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (llama, folder)]
    chat = [{"role": "user", "content": "w3 w14 w15"}]
    texts = [t.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for t in tokenizers]
    ids = [t(text, return_tensors="pt")["input_ids"] for t, text in zip(tokenizers, texts, strict=True)]
    assert texts[0] == texts[1]
    assert torch.equal(*ids)
    torch.testing.assert_close(converted(ids[0]).logits, original(ids[0]).logits)


@pytest.mark.parametrize(("special", "ends"), [(ENDS, EOS), ({**ENDS, "eot_token_id": EOT}, [EOS, EOT])])
def test_special_tokens_are_the_headers(llama, tmp_path, special, ends) -> None:
    convert_gguf(write_gguf(llama, tmp_path / "tiny.gguf", special), tmp_path / "out", dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, PAD)
    assert model.generation_config.eos_token_id == ends
    assert model.generation_config.pad_token_id == PAD
    assert model.dtype == torch.bfloat16


def test_mistakes(llama, tmp_path, capsys) -> None:
    whole = write_gguf(llama, tmp_path / "tiny.gguf", ENDS)
    endless = write_gguf(llama, tmp_path / "endless.gguf", {})
    (tmp_path / "text.gguf").write_text("no model at all")
    (tmp_path / "short.gguf").write_bytes(whole.read_bytes()[:4000])
    taken = tmp_path / "taken"
    taken.mkdir()
    capsys.readouterr()
    for source, destination, message in (
        (tmp_path / "absent.gguf", tmp_path / "out", "there is no file"),
        (tmp_path / "text.gguf", tmp_path / "out", "is no whole GGUF file"),
        (tmp_path / "short.gguf", tmp_path / "out", "is no whole GGUF file"),
        (endless, tmp_path / "out", "does not say which token ends an answer"),
        (whole, taken, "exists already"),
    ):
        assert cli.main(["base", "from-gguf", str(source), str(destination)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_the_file_is_read_once(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    class Reader(gguf.GGUFReader):
        def __init__(self, file: str) -> None:
            reads.append(file)
            super().__init__(file)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    convert_gguf(write_gguf(llama, tmp_path / "model.gguf", ENDS), tmp_path / "model")
    assert reads == [str(tmp_path / "model.gguf")]
    assert gguf.GGUFReader is Reader
