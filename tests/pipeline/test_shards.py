"""Shards against bytes laid out by hand; the order of blocks: one permutation, whoever walks it."""

import contextlib
import pickle
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.errors import UserError
from pipeline import shards
from pipeline.shards import ShardBlocks, ShardWriter, ShuffledBlocks, find_shards, open_shard, permuted


def by_hand(tokens: list[int], magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    """A shard as llm.c's loader expects it: 256 int32, then uint16."""
    head = [magic, version, len(tokens) if count is None else count, *[0] * 253]
    return struct.pack("<256i", *head) + struct.pack(f"<{len(tokens)}H", *tokens)


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1 << 16, count).tolist()


@pytest.mark.parametrize(("count", "limit"), [(1, 1), (7, 3), (1000, 1000), (1001, 1000), (999, 1000), (2500, 211)])
@pytest.mark.parametrize("part", [1, 13, 5000])
def test_written_shards_are_llm_cs_bytes(count: int, limit: int, part: int, tmp_path: Path) -> None:
    tokens = random_tokens(count)
    writer = ShardWriter(tmp_path, "train", limit)
    for start in range(0, count, part):
        writer.add(np.array(tokens[start : start + part]))
    writer.finish(count)
    parts = [tokens[start : start + limit] for start in range(0, count, limit)]
    if len(parts) > 1 and 2 * len(parts[-1]) < limit:  # the last one would be short: the last two share
        both = parts[-2] + parts[-1]
        parts[-2:] = both[: -(-len(both) // 2)], both[-(-len(both) // 2) :]
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == [by_hand(part) for part in parts]
    shards = find_shards(tmp_path, "train")
    assert [shard.read(0, shard.tokens).tolist() for shard in shards] == parts
    assert not find_shards(tmp_path, "val")


@pytest.mark.parametrize("kept", [0, 1, 210, 211, 212, 422, 500])
def test_a_writer_goes_on_after_what_is_known_to_be_written(kept: int, tmp_path: Path) -> None:
    tokens = random_tokens(640)
    killed = ShardWriter(tmp_path, "train", 211)
    killed.add(np.array(tokens[:kept] + [9] * 130))  # the last 130 were not yet accounted for
    killed.sync()
    again = ShardWriter(tmp_path, "train", 211, kept)
    again.add(np.array(tokens[kept:]))
    again.finish(640)
    written = b"".join(path.read_bytes()[1024:] for path in sorted(tmp_path.iterdir()))
    assert written == by_hand(tokens)[1024:]
    assert sum(shard.tokens for shard in find_shards(tmp_path, "train")) == 640


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("count", "wanted"), [(640, [211, 211, 218 // 2, 218 // 2]), (633, [211] * 3), (630, [211, 211, 208])]
)
def test_finishing_killed_at_any_instant_ends_the_same(
    count: int, wanted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each call that puts something onto the disk, before and after it; more was written than is wanted."""
    tokens = random_tokens(900)
    places = {"fsync": shards.os, "replace": Path, "unlink": Path, "open": Path}
    for stop in range(60):
        folder = tmp_path / str(stop)
        folder.mkdir()
        writer = ShardWriter(folder, "train", 211)
        writer.add(np.array(tokens))
        writer.sync()
        left = stop

        def dying(original: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    raise Killed
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for name, place in places.items():
                patch.setattr(place, name, dying(getattr(place, name)))
            writer.finish(count)
        ShardWriter(folder, "train", 211, count).finish(count)
        found = find_shards(folder, "train")
        assert [shard.tokens for shard in found] == wanted, stop
        assert np.concatenate([shard.read(0, shard.tokens) for shard in found]).tolist() == tokens[:count]
    assert left > 0  # the last ones were not killed


def test_a_shard_that_was_cut_since_is_not_filled_up_with_zeros(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", 100)
    writer.add(np.arange(150))
    writer.sync()
    path = tmp_path / "train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    for act in (lambda again: again.add(np.arange(3)), lambda again: again.finish(150)):
        with pytest.raises(UserError, match=r"train_000001\.bin: shorter than it was; delete the folder"):
            act(ShardWriter(tmp_path, "train", 100, 150))
    path.unlink()
    with pytest.raises(UserError, match=r"train_000001\.bin: missing"):
        ShardWriter(tmp_path, "train", 100, 150).finish(150)


def test_an_unfinished_shard_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", 100)
    writer.add(np.arange(50))
    writer.sync()
    with pytest.raises(UserError, match="begins with 0, 0"):
        find_shards(tmp_path, "train")


def test_llm_cs_names(tmp_path: Path) -> None:
    for name in ("tiny_shakespeare_val.bin", "fineweb_train_000002.bin", "fineweb_train_000001.bin", "interval.bin"):
        (tmp_path / name).write_bytes(by_hand([1, 2]))
    assert [shard.path.name for shard in find_shards(tmp_path, "train")] == [
        "fineweb_train_000001.bin",
        "fineweb_train_000002.bin",
    ]
    assert [shard.path.name for shard in find_shards(tmp_path, "val")] == ["tiny_shakespeare_val.bin"]


BROKEN = {
    "empty": (b"", "0 bytes, less than a shard's header of 1024"),
    "half a header": (by_hand([])[:1000], "1000 bytes, less than"),
    "another magic": (by_hand([1], magic=20240521), "begins with 20240521, 1"),
    "another version": (by_hand([1], version=2), "begins with 20240520, 2"),
    "text": (b"the cat sat " * 200, "begins with "),
    "llama's": (by_hand([1, 2], magic=20240801, version=7), "32-bit tokens"),
    "cut off": (by_hand([1, 2, 3])[:-2], "the header says 3 tokens, the file holds 2;"),
    "cut off in a token": (by_hand([1, 2, 3])[:-1], r"the file holds 2\.5;"),
    "too long": (by_hand([1, 2, 3]) + b"\0\0", "the file holds 4;"),
    "no tokens": (by_hand([]), "the header says 0 tokens"),
    "a negative count": (by_hand([1], count=-1), "the header says -1 tokens"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_shard_is_one_line(name: str, tmp_path: Path) -> None:
    content, said = BROKEN[name]
    path = tmp_path / "train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        open_shard(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory; give a readable shard"):
        open_shard(tmp_path / "train_000000.bin")


def blocks_of(folder: Path, sizes: list[int], length: int, vocab_size: int = 1 << 16) -> ShardBlocks:
    for number, size in enumerate(sizes):
        (folder / f"train_{number:06d}.bin").write_bytes(by_hand(random_tokens(size, number)))
    return ShardBlocks(find_shards(folder, "train"), length, vocab_size)


def test_blocks_stay_within_shards(tmp_path: Path) -> None:
    sizes = [23, 4, 5, 11]
    blocks = blocks_of(tmp_path, sizes, 5)
    wanted = [
        random_tokens(size, number)[start : start + 5]
        for number, size in enumerate(sizes)
        for start in range(0, size - 4, 5)
    ]
    assert len(blocks) == 7 and [block.tolist() for block in blocks] == wanted
    for index in (-1, 7):
        with pytest.raises(IndexError):
            blocks[index]
    assert len(ShardBlocks([], 5, 9)) == 0


def test_a_token_outside_the_vocabulary(tmp_path: Path) -> None:
    largest = max(random_tokens(5))
    assert blocks_of(tmp_path, [5], 5, largest + 1)[0].max() == largest
    with pytest.raises(UserError, match=rf"train_000000\.bin: holds token {largest}, the vocabulary has {largest};"):
        blocks_of(tmp_path, [5], 5, largest)[0]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 64, 65, 1000])
def test_each_order_is_a_permutation(count: int) -> None:
    orders = {tuple(permuted(index, count, f"3,{epoch}") for index in range(count)) for epoch in range(9)}
    assert all(sorted(order) == list(range(count)) for order in orders)
    if count >= 16:
        assert len(orders) == 9


def test_the_order_does_not_depend_on_machine_or_version() -> None:
    assert [permuted(index, 10, "0,0") for index in range(10)] == [8, 2, 4, 6, 0, 5, 1, 3, 9, 7]


def test_every_place_is_as_likely() -> None:
    """Where 0 and 1 go, over many keys: chi-squared of single places and of pairs."""
    count, draws = 7, 4200
    drawn = [(permuted(0, count, f"{key},0"), permuted(1, count, f"{key},0")) for key in range(draws)]
    for seen, cells in ((Counter(first for first, _ in drawn), 7), (Counter(drawn), 42)):
        expected = draws / cells
        assert len(seen) == cells
        chi = sum((count - expected) ** 2 / expected for count in seen.values())
        assert chi < cells - 1 + 4 * (2 * (cells - 1)) ** 0.5  # four standard deviations


def test_a_huge_corpus_costs_no_memory() -> None:
    """Ten billion blocks: the order is computed, not stored."""
    places = {permuted(index, 10**10 + 1, "0,0") for index in range(1000)}
    assert len(places) == 1000 and max(places) > 9 * 10**9 and min(places) < 10**9


@pytest.mark.parametrize("epoch", [0, 3])
def test_any_number_of_processes_walks_one_order(epoch: int, tmp_path: Path) -> None:
    blocks = blocks_of(tmp_path, [103, 55, 31], 3)
    alone = ShuffledBlocks(blocks, seed=5)
    alone.set_epoch(epoch)
    order = [alone[index]["input_ids"].tolist() for index in range(len(alone))]
    assert len(order) == len(blocks) and Counter(map(tuple, order)) == Counter(
        tuple(block.tolist()) for block in blocks
    )
    for world in (2, 3):
        shares = [ShuffledBlocks(blocks, 5, rank, world) for rank in range(world)]
        for share in shares:
            share.set_epoch(epoch)
        assert {len(share) for share in shares} == {len(order) // world}
        together = [share[index]["input_ids"].tolist() for index in range(len(shares[0])) for share in shares]
        assert together == order[: len(order) // world * world]


def test_epochs_and_seeds_differ_and_come_again(tmp_path: Path) -> None:
    blocks = blocks_of(tmp_path, [300], 3)

    def walk(seed: int, epoch: int) -> list[tuple[int, ...]]:
        shuffled = ShuffledBlocks(blocks, seed)
        shuffled.set_epoch(epoch)
        return [tuple(shuffled[index]["labels"].tolist()) for index in range(len(shuffled))]

    walks = [walk(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(one) for one in walks}) == 4 and len({frozenset(one) for one in walks}) == 1
    assert walk(1, 1) == walks[3]


def test_a_walk_goes_on_from_epoch_and_index(tmp_path: Path) -> None:
    """In another process, say: the position is these two numbers."""
    walked = ShuffledBlocks(blocks_of(tmp_path, [100], 3), seed=2, rank=1, world=2)
    walked.set_epoch(4)
    rest = [walked[index]["input_ids"].tolist() for index in range(7, len(walked))]
    fresh = pickle.loads(pickle.dumps(ShuffledBlocks(walked.blocks, seed=2, rank=1, world=2)))
    fresh.set_epoch(4)
    assert [fresh[index]["input_ids"].tolist() for index in range(7, len(fresh))] == rest
