"""Micro-batches make the whole gradient, memory that runs out costs nothing, steps are whole."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from minalign.data import toy
from minalign.models import padding
from minalign.running import optimizer as module
from minalign.running.optimizer import Optimizer, warmup_factor
from minalign.running.ranks import Ranks

LENGTHS = [9, 3, 7, 5, 3, 8, 4]


@pytest.fixture
def model():
    return toy.make_model(toy.make_tokenizer(), seed=0)


def make(model, micro_batch_size=7, max_grad_norm=1e9, **options):
    config = SimpleNamespace(
        lr=1e-2, max_grad_norm=max_grad_norm, micro_batch_size=micro_batch_size, shard=False
    )
    return Optimizer(model, list(model.parameters()), config, Ranks(), **options)


def rows_of(lengths):
    """Token ids and a mask of what counts, as a batch on the right."""
    draws = torch.Generator().manual_seed(1)
    return padding.pad(
        [torch.randint(4, 40, (n,), generator=draws).tolist() for n in lengths], "right"
    )


def losses(model, rows):
    ids, mask = (x[rows] for x in rows_of(LENGTHS))
    logits = model(ids, attention_mask=mask).logits
    return logits.square().mean(2).masked_fill(~mask.bool(), 0.0).sum(1)


def gradient(model, optimizer, counted=1.0, before_backward=lambda rows: None):
    """The gradients that the passes of one batch leave, and the rows of each pass."""
    seen = []
    for rows, weight in optimizer.micro_batches(LENGTHS, counted):
        with optimizer.retry_in_halves():
            seen.append(rows)
            loss = weight * losses(model, rows).sum() / len(LENGTHS)
            before_backward(rows)
            loss.backward()
    return [p.grad.clone() for p in model.parameters()], seen


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_micro_batches_make_the_gradient_of_the_whole_batch(model, size):
    whole = torch.autograd.grad(losses(model, slice(None)).mean(), list(model.parameters()))
    parts, seen = gradient(model, make(model, size))
    assert sorted(row for rows in seen for row in rows) == list(range(7))
    assert max(map(len, seen)) == size
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_batch_that_counts_nothing_leaves_gradients_of_zero(model):
    """Ranks.rows gives such a row to a process that has none: its gradients join the sum."""
    gradients, _ = gradient(model, make(model), counted=0.0)
    assert all((g == 0).all() for g in gradients)


def test_idle_passes_count_nothing(model, monkeypatch):
    """With --shard every process makes as many passes as the one with the most."""
    optimizer = make(model, micro_batch_size=3)
    optimizer.sharded, optimizer.ranks = (
        True,
        SimpleNamespace(most=lambda number, device: number + 2),
    )
    passes = list(optimizer.micro_batches(LENGTHS, 0.5))
    assert [weight for _, weight in passes] == [0.5] * 3 + [0.0] * 2
    assert all(len(rows) == 1 for rows, _ in passes[3:])


def test_memory_that_runs_out_costs_no_gradient(model, capsys):
    """In the second pass, when there are gradients already, and once more with half the rows."""
    expected, _ = gradient(model, make(model, 4))
    optimizer, calls = make(model, 4), []

    def fails(rows):
        calls.append(len(rows))
        if len(calls) in (2, 5):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    got, seen = gradient(model, optimizer, before_backward=fails)
    assert [len(rows) for rows in seen] == [4, 3, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    assert optimizer.micro_batch_size == 1
    assert capsys.readouterr().out.count("going on with --micro-batch-size") == 2
    for a, b in zip(expected, got):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_last_pass_may_run_out_of_memory_too(model):
    expected, _ = gradient(model, make(model, 4))
    calls = []

    def fails(rows):
        calls.append(rows)
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")

    got, seen = gradient(model, make(model, 4), before_backward=fails)
    assert len(seen) == 2 + 4
    for a, b in zip(expected, got):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_step_is_adamw_on_the_clipped_gradient(model):
    twin = toy.make_model(toy.make_tokenizer(), seed=0)
    optimizer = make(model, 3, max_grad_norm=0.5, weight_decay=0.01)
    reference = torch.optim.AdamW(twin.parameters(), lr=3e-2, weight_decay=0.01)
    for _ in range(2):
        losses(twin, slice(None)).mean().backward()
        expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5).item()
        reference.step()
        reference.zero_grad()
        gradient(model, optimizer)
        optimizer.lr = 3e-2
        assert optimizer.step() == pytest.approx(expected, rel=1e-4) and expected > 0.5
        assert all(p.grad is None for p in model.parameters())
    assert optimizer.lr == 3e-2
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)
    for ours, theirs in zip(optimizer.state_dict()["state"].values(), reference.state.values()):
        torch.testing.assert_close(ours["exp_avg"], theirs["exp_avg"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case", ["nan", "inf", "skip"])
def test_a_step_that_must_not_be_taken_changes_nothing(model, case):
    optimizer = make(model)
    gradient(model, optimizer)
    optimizer.step()  # so that there is a state
    weights = [p.detach().clone() for p in model.parameters()]
    state = [values["exp_avg"].clone() for values in optimizer.state_dict()["state"].values()]
    gradient(model, optimizer)
    if case != "skip":
        next(iter(model.parameters())).grad[0, 0] = float(case)
    norm = optimizer.step(skip=case == "skip")
    assert math.isfinite(norm) == (case == "skip")
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    after = [values["exp_avg"] for values in optimizer.state_dict()["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(state, after))
    assert all(p.grad is None for p in model.parameters())


def test_gradients_of_the_processes_are_summed(model):
    summed = []
    optimizer = make(model)
    optimizer.ranks = SimpleNamespace(sum_=summed.extend)
    gradient(model, optimizer)
    optimizer.step()
    assert len(summed) == len(list(model.parameters()))


def test_a_forward_pass_runs_in_its_dtype_and_on_the_trained_weights(model):
    optimizer = make(model)
    product = optimizer.forward(lambda net, x: (net, x @ x), torch.bfloat16)
    net, result = product(torch.ones(2, 2))
    assert net is model and result.dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_a_state_goes_on_exactly(model):
    optimizer = make(model)
    gradient(model, optimizer)
    optimizer.step()
    twin = toy.make_model(toy.make_tokenizer(), seed=0)
    twin.load_state_dict(model.state_dict())
    other = make(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, one in ((model, optimizer), (twin, other)):
        gradient(net, one)
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_the_learning_rate_may_start_at_its_peak():
    assert warmup_factor(1, 0) == 1.0 and module.warmup_factor(3, 6) == 0.5
