"""The order of the images as a pure function of seed and epoch, so that a run resumes exactly where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from crbp.errors import SettingsError

if TYPE_CHECKING:
    from crbp.data.pathfinder import Sample


class Key(NamedTuple):
    """Which image a batch asks for, and how it is turned over."""

    item: int
    flip_x: bool
    flip_y: bool


class EpochSampler(DistributedSampler[Key]):
    """Each process's share of an epoch, flips included: a function of ``(seed, epoch)`` and nothing else.

    Process ``r`` of ``n`` takes every ``n``-th image from ``r`` on, so that all processes together see the batches
    that one process would with ``n`` times the batch. Shuffled epochs leave out the last few images where they do not
    divide evenly; ordered ones give every image to exactly one process, none twice. An epoch that is resumed shares
    out the images from ``start`` on in the same way, whatever number of processes has seen those before.

    Args:
        size: images of an epoch, over all processes.
        seed: of order and flips.
        shuffle: draw a new order every epoch.
        flips: turn each image over, left to right and top to bottom, with probability ½ each.
        lead_in: so many images at the start of epoch 0 are ``size``, ``size + 1``, … instead: those of another data set
            that follows.
        rank: of this process.
        world_size: number of processes.

    Raises:
        SettingsError: where a process would have no image of an ordered epoch.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        shuffle: bool,
        flips: bool,
        lead_in: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not shuffle and 0 < size < world_size:
            raise SettingsError(
                f"each of the {world_size} processes needs an image to validate, test or predict with, and there "
                f"{'is 1' if size == 1 else f'are {size}'}; lower trainer.devices or give more"
            )
        # A DistributedSampler by name, so that Lightning leaves it in place instead of wrapping it into another.
        super().__init__(_Sized(size), num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.size, self.flips, self.lead_in = size, flips, lead_in
        self.start = 0  # images of the epoch, over all processes, to leave out where it is resumed

    def __len__(self) -> int:
        """Images of this process in a whole epoch."""
        return len(self._share(0))

    def left(self, start: int) -> int:
        """Images of this process in an epoch of which all processes have seen the first ``start``."""
        return len(self._share(start))

    def _share(self, start: int) -> range:
        left = max(self.size - start, 0)
        taken = left - left % self.num_replicas if self.shuffle else left
        return range(start + self.rank, start + taken, self.num_replicas)

    def __iter__(self) -> Iterator[Key]:
        """The share of this process in the current epoch, from ``start`` on."""
        return self.keys(self.start)

    def keys(self, start: int) -> Iterator[Key]:
        """The share of this process in the current epoch, from ``start`` on."""
        # torch's generator reads 32 bits of a seed, so seed and epoch are mixed before and not side by side.
        digest = hashlib.blake2b(f"{self.seed} {self.epoch}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
        if self.epoch == 0:
            order[: self.lead_in] = torch.arange(self.size, self.size + self.lead_in)
        flips = torch.randint(2, (self.size, 2), generator=generator) * int(self.flips)
        share = list(self._share(start))
        mine = (order[share].tolist(), flips[share].tolist())
        for item, (flip_x, flip_y) in zip(*mine, strict=True):
            yield Key(item, bool(flip_x), bool(flip_y))


@dataclass(frozen=True)
class _Sized(Dataset[None]):
    size: int

    def __len__(self) -> int:
        return self.size


class Followed(Dataset["Sample"]):
    """Two data sets as one: ``first``, then ``second``, its indices counted on from ``size``.

    Unlike torch's `ConcatDataset` it lets a data set make the images of a batch together.
    """

    def __init__(self, first: Dataset[Sample], size: int, second: Dataset[Sample]) -> None:
        self.first, self.size, self.second = first, size, second

    def __getitem__(self, index: int) -> Sample:
        """The item at ``index``."""
        return self.first[index] if index < self.size else self.second[index - self.size]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The items of a batch."""
        if all(index < self.size for index in indices):
            return together(self.first, indices)
        if all(index >= self.size for index in indices):
            return together(self.second, [index - self.size for index in indices])
        return [self[index] for index in indices]


class Flipped(Dataset["Sample"]):
    """A data set asked by `Key`: the image and mask at an index, turned over as the key says.

    Args:
        items: maps an index to ``{"image": (1, H, W), "mask": (H, W), "label": int}``.
    """

    def __init__(self, items: Dataset[Sample]) -> None:
        self.items = items

    def __getitem__(self, key: Key) -> Sample:
        """The item at ``key.item``, with image and mask turned over alike."""
        return _turned(self.items[key.item], key)

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample]:
        """The items of a batch, made together where the data set can."""
        items = together(self.items, [key.item for key in keys])
        return [_turned(item, key) for item, key in zip(items, keys, strict=True)]


def together(items: Dataset[Sample], indices: Sequence[int]) -> list[Sample]:
    """Some items of a data set, made together where it can."""
    make = getattr(items, "__getitems__", None)
    found: list[Sample] = make(indices) if make is not None else [items[index] for index in indices]
    return found


def stacked(items: Dataset[Sample], count: int) -> tuple[Tensor, Tensor]:
    """The first images ``(B, 1, H, W)`` of a data set and their masks ``(B, H, W)``."""
    samples = together(items, range(count))
    return torch.stack([each["image"] for each in samples]), torch.stack([each["mask"] for each in samples])


def _turned(item: Sample, key: Key) -> Sample:
    axes = [axis for axis, flip in ((-1, key.flip_x), (-2, key.flip_y)) if flip]
    return {**item, "image": item["image"].flip(axes), "mask": item["mask"].flip(axes)} if axes else item


class ResumableLoader(DataLoader[Any]):
    """A loader over an `EpochSampler` that a checkpoint can take up again in the middle of an epoch.

    The data modules save `state_dict` with every checkpoint. The order of an epoch being known beforehand, the epoch
    and the number of images handed out to all processes are all there is to save; batches of another size, or another
    number of processes, can then go on with the images that are left.
    """

    sampler: EpochSampler

    def __init__(self, items: Dataset[Any], sampler: EpochSampler, **settings: Any) -> None:
        super().__init__(items, sampler=sampler, **settings)
        assert self.batch_size is not None
        self.together: int = self.batch_size * sampler.num_replicas  # images of a batch of all processes
        self._given = 0
        self._begun = (0, 0)  # images given and batches done where the epoch began for this loader
        self._resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator: the epoch is read on the first batch
        """The batches of the sampler's epoch, or the rest of them where that epoch was interrupted."""
        self._given = self._resumed_at(self.sampler.epoch)
        self._begun = self._given, self.batches_done(self.sampler.epoch)
        self._resume = None
        self.sampler.start = self._given
        for batch in super().__iter__():
            self._given += self.together
            yield batch

    def keys(self, batch: int) -> list[Key]:
        """What a batch of the current epoch is made of, by its number as the trainer counts."""
        assert self.batch_size is not None
        start, done = self._begun
        return list(islice(self.sampler.keys(start + (batch - done) * self.together), self.batch_size))

    def batches_done(self, epoch: int) -> int:
        """Batches of an epoch that are not to come, where it is resumed."""
        assert self.batch_size is not None
        return len(self) - self.sampler.left(self._resumed_at(epoch)) // self.batch_size

    def state_dict(self) -> dict[str, int]:
        """Where the current epoch stands."""
        return {"epoch": self.sampler.epoch, "images": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up the epoch that ``state`` was saved in at the image after the last one handed out.

        Raises:
            SettingsError: if the state counts something else.
        """
        if "images" not in state:
            raise SettingsError(
                f"the checkpoint says where the training images stand as {sorted(state)}, not as epoch and images; "
                "resume it with the version of crbp that wrote it"
            )
        self._resume = (state["epoch"], state["images"])

    def _resumed_at(self, epoch: int) -> int:
        return self._resume[1] if self._resume is not None and self._resume[0] == epoch else 0
