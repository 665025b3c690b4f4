"""Batches of prompts: groups side by side, every prompt once an epoch, cut anew each time."""

import itertools

from minalign.data.chat import TokenizedPrompt
from minalign.data.prompts import prompt_batches

PROMPTS = [TokenizedPrompt(list(range(10 * n, 10 * n + 10))) for n in range(6)]


def take(count, span=None, batch_size=4, group_size=2, seed=0):
    batches = prompt_batches(PROMPTS, span, batch_size, group_size, seed)
    return list(itertools.islice(batches, count))


def test_a_prompt_stands_group_size_times_in_a_row():
    for batch in take(9, batch_size=6, group_size=3):
        assert len(batch) == 6 and batch[:3] == [batch[0]] * 3 and batch[3:] == [batch[3]] * 3
        assert batch[0] != batch[3]


def test_each_prompt_comes_once_an_epoch_in_another_order():
    firsts = [prompt.ids[0] for batch in take(6) for prompt in batch[::2]]
    epochs = [firsts[:6], firsts[6:]]
    assert all(sorted(epoch) == [0, 10, 20, 30, 40, 50] for epoch in epochs)
    assert epochs[0] != epochs[1] and take(3) == take(3) != take(3, seed=1)


def test_with_a_span_a_prompt_is_cut_once_for_its_group():
    batches = take(12, span=(2, 7))
    lengths = {len(prompt.ids) for batch in batches for prompt in batch}
    assert lengths == {2, 3, 4, 5, 6, 7}
    for batch in batches:
        assert batch[0] == batch[1] and batch[2] == batch[3]
        assert all(p.ids == list(range(p.ids[0], p.ids[0] + len(p.ids))) for p in batch)
        assert all(prompt.ids[0] % 10 == 0 for prompt in batch)
