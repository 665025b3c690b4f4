"""--baseline names the estimator that runs."""

import pytest
import torch

import train_policy
from minalign.reinforce import MovingAverageBaseline, leave_one_out_advantages

FIRST, SECOND = torch.tensor([1.0, 3.0, 2.0, 6.0]), torch.tensor([4.0, 0.0, 8.0, 5.0])


@pytest.mark.parametrize("name", ["moving", "ema", "rloo", "none"])
def test_each_baseline_is_the_function_of_its_name(name):
    """On the second batch, when the moving ones have a past: means 3 and, with decay .9, 3, too."""
    config = train_policy.resolve(train_policy.Config(baseline=name, batch_size=4))
    baseline = MovingAverageBaseline(config.baseline_decay)
    estimate = train_policy.advantage_estimator(config, baseline)
    estimate(FIRST)
    expected = {
        "moving": SECOND - 3.0,
        "ema": SECOND - 3.0,
        "rloo": leave_one_out_advantages(SECOND, 4),
        "none": SECOND,
    }
    torch.testing.assert_close(estimate(SECOND), expected[name])
    past = {"moving": 29 / 8, "ema": (0.09 * 3.0 + 0.1 * 4.25) / 0.19}
    assert baseline.value == pytest.approx(past.get(name, 0.0))  # decay .9, bias-corrected
