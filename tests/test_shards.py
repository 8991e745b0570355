"""Latent shards: random access, memory, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from LightningDiT.data.shards import LatentShards, iterate_shards, shard_path, write_shard
from LightningDiT.errors import LightningDiTError


@pytest.fixture
def shard_folder(tmp_path: Path) -> Path:
    """Three shards of 3, 4 and 2 latents, numbered through; mirrored ones are 100 higher."""
    start = 0
    for index, count in enumerate((3, 4, 2)):
        latents = torch.arange(start, start + count).float().view(-1, 1, 1, 1).expand(count, 2, 2, 2)
        labels = torch.arange(start, start + count)
        write_shard(shard_path(tmp_path, 0, index), latents, labels, latents + 100)
        start += count
    return tmp_path


def test_shards_read_at_random_places(shard_folder: Path) -> None:
    shards = LatentShards(shard_folder)
    assert len(shards) == 9
    assert shards.shape == (2, 2, 2)
    indices = torch.tensor([8, 0, 3, 2, 6])
    latents, labels = shards.batch(indices)
    assert latents[:, 1, 0, 1].tolist() == indices.tolist()
    assert labels.tolist() == indices.tolist()
    flipped, _ = shards.batch(indices, torch.tensor([True, False, True, False, False]))
    assert flipped[:, 0, 0, 0].tolist() == [108, 0, 103, 2, 6]


def test_sets_without_mirrored_latents_ignore_the_wish(tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, 0, 0), torch.ones(2, 1, 1, 1), torch.zeros(2, dtype=torch.long))
    latents, _ = LatentShards(tmp_path).batch(torch.tensor([1, 0]), torch.tensor([True, True]))
    assert latents.flatten().tolist() == [1, 1]


def test_missing_and_damaged_shards_are_named(shard_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError, match="no latent shards"):
        list(iterate_shards(tmp_path / "none"))
    first = shard_path(shard_folder, 0, 0)
    with pytest.raises(LightningDiTError, match="is a file, the folder of latent shards"):
        list(iterate_shards(first))
    first.write_bytes(first.read_bytes()[:-30])
    with pytest.raises(LightningDiTError, match="cut short or damaged"):
        list(iterate_shards(shard_folder))


def test_shards_of_any_number_are_read_in_order(tmp_path: Path) -> None:
    for index in (0, 2, 10, 999, 1000, 1001):
        write_shard(shard_path(tmp_path, 0, index), torch.full((1, 1, 1, 1), float(index)), torch.tensor([index]))
    write_shard(shard_path(tmp_path, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([7]))  # of a second process
    assert LatentShards(tmp_path).labels.tolist() == [0, 2, 10, 999, 1000, 1001, 7]


def test_random_batches_are_rows_of_the_files(tmp_path: Path) -> None:
    """Against the tensors as they were written, in random order, with repeats."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(size, 3, 2, 2, generator=generator) for size in (5, 1, 8)]
    labels = torch.randint(9, (14,), generator=generator)
    for index, (part, named) in enumerate(zip(parts, labels.split([5, 1, 8]), strict=True)):
        write_shard(shard_path(tmp_path, 0, index), part, named, -part)
    write_shard(shard_path(tmp_path, 0, 3), torch.zeros(0, 3, 2, 2), torch.zeros(0, dtype=torch.long))  # none readable
    whole = torch.cat(parts)
    shards = LatentShards(tmp_path)
    assert shards.has_flips  # the empty shard has none, and counts for nothing
    indices = torch.randint(14, (20,), generator=generator)
    latents, found = shards.batch(indices)
    assert torch.equal(latents, whole[indices])
    assert torch.equal(found, labels[indices])
    flips = torch.rand(20, generator=generator) < 0.5
    mirrored, _ = shards.batch(indices, flips)
    assert torch.equal(mirrored, torch.where(flips.view(-1, 1, 1, 1), -whole[indices], whole[indices]))
    with pytest.raises(IndexError):
        shards.batch(torch.tensor([14]))


def test_the_memory_of_a_batch_is_used_again_only_once_nobody_has_it(shard_folder: Path) -> None:
    shards = LatentShards(shard_folder)
    batches = [shards.batch(torch.tensor([place]))[0] for place in range(5)]
    view = batches[4][0, 0].view(-1)[:1]
    assert [float(latents[0, 0, 0, 0]) for latents in batches] == [0, 1, 2, 3, 4]
    del batches
    others = [shards.batch(torch.tensor([8]))[0] for _ in range(4)]
    assert float(view) == 4.0  # a view alone holds it
    assert all(float(latents[0, 0, 0, 0]) == 8.0 for latents in others)
    place = others[3].data_ptr()
    del others
    taken = [shards.batch(torch.tensor([1]))[0] for _ in range(2)]
    assert place in [latents.data_ptr() for latents in taken]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_shards_of_any_precision_give_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(6.0).view(3, 2, 1, 1) / 4  # exact in all of them
    write_shard(shard_path(tmp_path, 0, 0), values.to(dtype), torch.arange(3))
    latents, _ = LatentShards(tmp_path).batch(torch.tensor([2, 0]))
    assert latents.dtype == torch.float32
    assert torch.equal(latents, values[[2, 0]])


@pytest.mark.parametrize(
    ("latents", "labels", "flipped", "message"),
    [
        ((2, 1, 1, 1), [0, 1, 2], None, r"latents \[2, 1, 1, 1\] and labels \[3\]"),
        ((2, 1, 1), [0, 1], None, r"latents \[2, 1, 1\]"),
        ((2, 1, 1, 1), [0.5, 1], None, "float32"),
        ((2, 1, 1, 1), [0, -1], None, "the label -1 is no class"),
        ((2, 1, 1, 1), [0, 1], (1, 1, 1, 1), r"latents_flip has the shape \[1, 1, 1, 1\]"),
    ],
)
def test_shards_whose_tensors_do_not_belong_together_are_named(
    latents: tuple[int, ...], labels: list[float], flipped: tuple[int, ...] | None, message: str, tmp_path: Path
) -> None:
    path = shard_path(tmp_path, 0, 0)
    write_shard(path, torch.zeros(latents), torch.tensor(labels), None if flipped is None else torch.ones(flipped))
    with pytest.raises(LightningDiTError, match=message) as caught:
        LatentShards(tmp_path)
    assert str(path) in str(caught.value)


def test_shards_of_two_shapes_are_no_set(tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, 0, 0), torch.zeros(1, 4, 2, 2), torch.tensor([0]))
    write_shard(shard_path(tmp_path, 0, 1), torch.zeros(1, 4, 4, 4), torch.tensor([0]))
    with pytest.raises(LightningDiTError, match=r"shapes \(4, 2, 2\) and \(4, 4, 4\)"):
        LatentShards(tmp_path)


def test_what_is_known_of_each_latent_comes_back_over_all_shards(tmp_path: Path) -> None:
    told = {
        "conditions": torch.tensor([2, 0, 1]),
        "augmentation": torch.arange(6.0).view(3, 2),
        "windows": torch.tensor([7, 7, 9], dtype=torch.int32),
    }
    for index, rows in enumerate((slice(0, 2), slice(2, 3))):
        extras = {name: tensor[rows] for name, tensor in told.items()}
        latents = torch.zeros(len(extras["windows"]), 1, 2, 2)
        write_shard(shard_path(tmp_path, 0, index), latents, torch.zeros(len(latents)).long(), extras=extras)
    write_shard(shard_path(tmp_path, 0, 2), torch.zeros(0, 1, 2, 2), torch.zeros(0).long())  # none readable
    shards = LatentShards(tmp_path)
    for name, tensor in told.items():
        assert torch.equal(getattr(shards, name), tensor.float() if name == "augmentation" else tensor.long())
    write_shard(shard_path(tmp_path, 0, 3), torch.zeros(1, 1, 2, 2), torch.zeros(1).long())
    with pytest.raises(LightningDiTError, match="2 of 3 shards in .* have conditions"):
        LatentShards(tmp_path)


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"conditions": torch.tensor([0])}, r"conditions is \[1\] \(int64\); \[N\] whole numbers with N = 2"),
        ({"conditions": torch.tensor([0.0, 1.0])}, r"conditions is \[2\] \(float32\)"),
        ({"windows": torch.tensor([0, -3])}, "windows has -3; 0 and more"),
        ({"augmentation": torch.zeros(2)}, r"augmentation is \[2\] \(float32\); \[N, A\] fractions"),
        ({"augmentation": torch.zeros(2, 5, dtype=torch.long)}, "augmentation is .*int64"),
        ({"augmentation": torch.tensor([[0.0], [torch.nan]])}, "augmentation has values that are NaN"),
    ],
)
def test_what_is_known_of_latents_has_a_row_for_each(
    extras: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    path = shard_path(tmp_path, 0, 0)
    write_shard(path, torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]), extras=extras)
    with pytest.raises(LightningDiTError, match=message) as caught:
        LatentShards(tmp_path)
    assert str(path) in str(caught.value)


def test_ordinary_shards_say_no_more_than_before(shard_folder: Path) -> None:
    shards = LatentShards(shard_folder)
    assert (shards.conditions, shards.augmentation, shards.windows) == (None, None, None)
