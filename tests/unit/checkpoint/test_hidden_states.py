from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import torch
from torch import Tensor

from verl_speculator.checkpoint import hidden_states
from verl_speculator.checkpoint.hidden_states import StatesCache, StatesCacheSettings, room_for, row_key
from verl_speculator.errors import CheckpointError, ConfigError

LAYERS, SIZE = [-1, 0, 2], 6
LENGTHS = [5, 1, 9, 3]
KEYS = [row_key(torch.arange(length)) for length in LENGTHS]


def states_of(rows: list[int]) -> list[Tensor]:
    """For each layer [T, H], other numbers for every row, token and layer."""
    parts = [torch.randn(len(LAYERS), LENGTHS[row], SIZE, generator=torch.Generator().manual_seed(row)) for row in rows]
    return list(torch.cat(parts, dim=1).unbind())


@pytest.fixture
def cache(tmp_path):
    def make(layers=LAYERS, num_writers=1, **settings) -> StatesCache:
        return StatesCache(
            StatesCacheSettings(**{"folder": str(tmp_path), "dtype": "float32", **settings}), layers, num_writers
        )

    return make


def keys(*rows: int) -> list[str]:
    return [KEYS[row] for row in rows]


def write(cache: StatesCache, *rows: int) -> None:
    cache.write(keys(*rows), states_of(list(rows)), [LENGTHS[row] for row in rows], seconds=1.0)


def test_rows_are_read_in_any_order_by_whoever_asks(cache) -> None:
    """Two writers, and batches that were not written together."""
    first, second, reader = cache(), cache(), cache()
    write(first, 0, 1)
    write(first, 2)
    write(second, 3)
    assert not first.has(keys(0)), "nothing is there before it is written to the disk"
    first.flush()
    second.flush()
    assert not reader.has(keys(2, 3))
    reader.find_new_shards()
    assert reader.has(keys(0, 1, 2, 3))
    reader.prefetch(keys(1, 3))
    for rows in ([3, 0, 2], [1], [2, 2, 1]):
        for found, expected in zip(reader.read(keys(*rows)), states_of(rows), strict=True):
            assert torch.equal(found, expected), rows
    assert reader.seconds_saved(keys(2, 3)) == 2.0
    assert reader.seconds_saved(keys(0)) == pytest.approx(5 / 6)


def test_states_are_kept_in_the_type_asked_for(cache) -> None:
    narrow = cache(dtype="bfloat16")
    write(narrow, 0)
    narrow.flush()
    for found, expected in zip(narrow.read(keys(0)), states_of([0]), strict=True):
        assert torch.equal(found, expected.bfloat16())


def test_a_row_is_its_tokens() -> None:
    row = torch.tensor([3, 1, 4])
    assert row_key(row) == row_key(row.to(torch.int32))
    assert len({row_key(row), row_key(row[:2]), row_key(row.flip(0)), *KEYS}) == 3 + len(KEYS)


def test_a_damaged_shard_is_refused(cache, tmp_path) -> None:
    writer = cache()
    write(writer, 0, 1)
    writer.flush()
    [shard] = tmp_path.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{shard.name} is damaged: delete it") as caught:
        cache().read(keys(0, 1))
    assert "\n" not in str(caught.value)
    shard.write_bytes(content[:20])
    with pytest.raises(CheckpointError, match=f"{shard.name} cannot be read"):
        cache()


def test_states_of_other_layers_are_refused(cache) -> None:
    writer = cache()
    write(writer, 0)
    writer.flush()
    with pytest.raises(
        ConfigError, match=r"the last layer after its norm, layer 0, layer 2 of the base, and .* layer 1"
    ):
        cache(layers=[1])


def test_it_grows_no_further_than_it_may(cache, tmp_path, capsys) -> None:
    """Each of two writers has half of the room, which is enough for two of the rows."""
    row_bytes = len(LAYERS) * SIZE * 4
    writer = cache(max_bytes=2 * 7 * row_bytes, num_writers=2)
    write(writer, 0, 1, 2)
    write(writer, 3)
    writer.flush()
    assert writer.has(keys(0, 1))
    assert not writer.has(keys(2))
    assert not writer.has(keys(3))
    assert capsys.readouterr().out.count("is full") == 1
    other = cache(max_bytes=0)
    write(other, 2)
    other.flush()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_plan_without_room_is_refused(tmp_path, monkeypatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(hidden_states._SPARE_BYTES + 5_000_000_000))
    assert room_for(tmp_path, 4_000_000_000, None) == 5_000_000_000
    with pytest.raises(ConfigError, match=r"take 6 GB more, and .* has room for 5: give a folder with more room"):
        room_for(tmp_path, 6_000_000_000, None)
    with pytest.raises(ConfigError, match=r"data.hidden_states_cache_gb=3 is less than the 4 GB"):
        room_for(tmp_path, 4_000_000_000, 3_000_000_000)
