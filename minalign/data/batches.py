"""Endless batches, each item once per epoch."""

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")


def length_grouped_batches(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Endless batches of indices, items of like length together, so that little is padding.

    Each epoch is shuffled, cut into groups of 50 batches, and only within a group sorted by length.
    The last batch of an epoch may be smaller.
    """
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        groups = [order[i : i + 50 * batch_size] for i in range(0, len(order), 50 * batch_size)]
        batches = []
        for group in groups:
            group.sort(key=lambda i: lengths[i])
            batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]


def shuffled_forever(items: Sequence[Item], seed: int) -> Iterator[Item]:
    """Each item once per epoch, in an order that differs between epochs and seeds."""
    rng = random.Random(seed)
    while True:
        yield from map(items.__getitem__, rng.sample(range(len(items)), len(items)))
