"""REINFORCE on plain tensors: baselines, the KL-shaped reward, the loss.

A whole completion is one action (Back to Basics, arXiv 2402.14740): one reward, one advantage, the
sum of its token log-probs. Shapes: B completions, T tokens. Everything returns float32 and leaves
its inputs alone. It needs nothing but `import torch` to be pasted elsewhere.
"""

import torch


class MovingAverageBaseline:
    """The running mean of earlier rewards, subtracted from new ones.

        A_i = R_i - b,   b = mean of all rewards of earlier batches
        (REINFORCE with baseline, arXiv 2402.14740)

    b is read before this batch enters it: a baseline that holds the sample itself would shrink its
    gradient. The first batch has no history, so each of its samples gets the mean of the others. A
    lone sample gets 0.

    Args:
        decay: None for the cumulative mean over samples. A float d in [0, 1) for an exponential
            average over batch means, bias-corrected:
            b = sum_j (1 - d) d^(n-j) mean_j / (1 - d^n).
    Raises:
        ValueError: decay outside [0, 1), rewards that are not (B,) with B >= 1, or a reward that
            is not finite.

    >>> baseline = MovingAverageBaseline()
    >>> baseline.advantages(torch.tensor([1.0, 3.0])), baseline.value
    (tensor([-2.,  2.]), 2.0)
    >>> baseline.advantages(torch.tensor([2.0, 8.0])), baseline.value
    (tensor([0., 6.]), 3.5)
    """

    def __init__(self, decay: float | None = None) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"got decay={decay}, expected None or a number in [0, 1)")
        self.decay = decay
        self._weighted_sum = 0.0
        self._weight = 0.0

    @property
    def value(self) -> float:
        """The baseline that the next batch will get (0.0 before any reward)."""
        return self._weighted_sum / self._weight if self._weight else 0.0

    def advantages(self, rewards: torch.Tensor) -> torch.Tensor:
        """Rewards (B,) minus the baseline from before them -> (B,) float32, detached.

        The rewards then enter the baseline.
        """
        if rewards.ndim != 1 or len(rewards) == 0:
            raise ValueError(f"got rewards {tuple(rewards.shape)}, expected (B,) with B >= 1")
        rewards = rewards.detach().float()
        mean = rewards.mean().item()
        # NaN fails, too. One such reward would stay in the mean forever.
        if not abs(mean) < float("inf"):
            raise ValueError(
                "got a reward that is not finite, expected numbers: find the text that has it"
            )
        if self._weight:
            advantages = rewards - self.value
        elif len(rewards) == 1:
            advantages = rewards.clone()
        else:
            # = R_i - mean of the others
            advantages = (rewards - rewards.mean()) * (len(rewards) / (len(rewards) - 1))
        if self.decay is None:
            self._weighted_sum += mean * len(rewards)
            self._weight += len(rewards)
        else:
            self._weighted_sum = self.decay * self._weighted_sum + (1 - self.decay) * mean
            self._weight = self.decay * self._weight + (1 - self.decay)
        return advantages

    def state_dict(self) -> dict[str, float | None]:
        """What `load_state_dict` needs to resume exactly here."""
        return {"decay": self.decay, "weighted_sum": self._weighted_sum, "weight": self._weight}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Resume from `state`. ValueError if it was made with another decay."""
        if state["decay"] != self.decay:
            raise ValueError(
                f"got a state with decay={state['decay']}, expected decay={self.decay}: "
                "the same baseline"
            )
        self._weighted_sum, self._weight = state["weighted_sum"], state["weight"]


def leave_one_out_advantages(
    rewards: torch.Tensor, group_size: int, applies: torch.Tensor | None = None
) -> torch.Tensor:
    """RLOO: each sample's reward minus the mean of the *other* samples of its prompt.

        A_i = R_i - 1/(k-1) sum_{j != i} R_j = k/(k-1) (R_i - mean)
        (Back to Basics, arXiv 2402.14740: RLOO)

    Args:
        rewards: (B,), the `group_size` samples of one prompt next to each other
            (`repeat_interleave`, not `repeat`).
        group_size: k >= 2; divides B.
        applies: (B,) bool, the samples that have a reward. The others get 0 and are no one's
            other; so does a sample without others. None is all.
    Returns:
        (B,) float32, detached; sums to 0 in every group.
    Raises:
        ValueError: group_size < 2 (there is no other sample), or B is not a multiple of it.

    >>> leave_one_out_advantages(torch.tensor([3.0, 1.0, 2.0]), 3)
    tensor([ 1.5000, -1.5000,  0.0000])
    """
    if group_size < 2:
        raise ValueError(
            f"got group_size={group_size}, expected 2 or more: a lone sample has no others to "
            "compare with"
        )
    if rewards.ndim != 1 or len(rewards) % group_size:
        raise ValueError(
            f"got rewards {tuple(rewards.shape)}, expected (B,) with B a multiple of "
            f"group_size={group_size}"
        )
    groups = rewards.detach().float().view(-1, group_size)  # (prompts, k)
    kept = torch.ones_like(groups, dtype=torch.bool) if applies is None else applies.view_as(groups)
    groups, count = groups.where(kept, 0.0), kept.sum(1, keepdim=True)
    # Subtracting the mean first keeps all digits when rewards share a large offset.
    centred = groups - groups.sum(1, keepdim=True) / count.clamp(min=1)
    return (centred * (count / (count - 1).clamp(min=1))).where(kept & (count > 1), 0.0).flatten()


class PromptBaseline(MovingAverageBaseline):
    """Each prompt's own running mean, which leans on that of all prompts while it is rare.

        A_i = R_i - b_x,   b_x = (S_x + g) / (W_x + 1)
        S_x <- d S_x + R_i,   W_x <- d W_x + 1   for each sample of the prompt x
        (after SPO, arXiv 2509.13232, for rewards of any range)

    g is the moving average over all prompts, and counts as one sample: an unseen prompt gets it
    whole. Both are read before this batch enters them.

    Args:
        decay: d in [0, 1), of a prompt's mean per sample of it, and of g per batch.
    Raises:
        ValueError: as MovingAverageBaseline, or no prompt for each reward.

    >>> baseline = PromptBaseline(0.5)
    >>> baseline.advantages(torch.tensor([1.0, 3.0]), ["x", "y"])
    tensor([-2.,  2.])
    >>> baseline.advantages(torch.tensor([2.0, 2.0]), ["x", "z"])  # b is (1 + 2) / 2, and 2
    tensor([0.5000, 0.0000])
    """

    def __init__(self, decay: float) -> None:
        super().__init__(decay)
        self._of_prompt = {}  # prompt -> (S, W)

    def advantages(self, rewards: torch.Tensor, prompts: list) -> torch.Tensor:
        """Rewards (B,) of these B prompts (any names), minus baselines -> (B,) float32, detached.

        The rewards then enter the baselines.
        """
        if len(prompts) != len(rewards):
            raise ValueError(f"got {len(prompts)} prompts for {len(rewards)} rewards, expected one")
        rewards = rewards.detach().float()
        overall = (rewards - super().advantages(rewards)).tolist()  # g, of each sample
        known = [self._of_prompt.get(prompt, (0.0, 0.0)) for prompt in prompts]
        baselines = [(total + g) / (weight + 1) for (total, weight), g in zip(known, overall)]
        for prompt, reward in zip(prompts, rewards.tolist()):
            total, weight = self._of_prompt.get(prompt, (0.0, 0.0))
            self._of_prompt[prompt] = (self.decay * total + reward, self.decay * weight + 1)
        return rewards - torch.tensor(baselines, device=rewards.device)

    def state_dict(self) -> dict:
        """What `load_state_dict` needs to resume exactly here."""
        return super().state_dict() | {"of_prompt": dict(self._of_prompt)}

    def load_state_dict(self, state: dict) -> None:
        """Resume from `state`. ValueError if it was made with another decay."""
        super().load_state_dict(state)
        self._of_prompt = dict(state["of_prompt"])


class ShrinkageBaseline:
    """RLOO's baseline, shrunk towards the mean reward of the batch's other prompts.

        A_i = R_i - b_i,   b_i = (1 - l) RLOO_i + l m_i,   l = v / (v + s)
        (shrinkage after James and Stein, arXiv 2511.03710)

    RLOO_i is the mean of the other samples of the prompt, m_i that of the other prompts' samples.
    v is the variance of RLOO_i about the prompt's true mean (that within a prompt over k - 1), and
    s that of true means between prompts. Both are averaged over *earlier* batches, so no part of
    b_i holds R_i. The first batch has l = 0, which is RLOO.

    Args:
        group_size: k >= 2, samples of a prompt, next to each other.
        decay: d in [0, 1), per batch, of the two averages.
    Raises:
        ValueError: those out of range, or a batch of fewer than two prompts.
    """

    def __init__(self, group_size: int, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"got decay={decay}, expected a number in [0, 1)")
        self.group_size, self.decay = group_size, decay
        self._within = self._between = 0.0  # variances: of a reward; of means between prompts

    @property
    def value(self) -> float:
        """l: how far the next batch's baselines lean on the other prompts."""
        error, between = self._within / (self.group_size - 1), max(self._between, 0.0)
        return error / (error + between) if error + between else 0.0

    def advantages(
        self, rewards: torch.Tensor, applies: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rewards (B,) minus their baselines -> (B,) float32, detached.

        `applies` is as in leave_one_out_advantages. The variances of the batch then enter the
        averages.
        """
        lean, advantages = self.value, leave_one_out_advantages(rewards, self.group_size, applies)
        groups = rewards.detach().float().view(-1, self.group_size)  # (P, k)
        if len(groups) < 2:
            raise ValueError(f"got {len(groups)} prompt, expected 2 or more: others to lean on")
        kept = torch.ones_like(groups, dtype=torch.bool)
        if applies is not None:
            kept = applies.view_as(groups)
        # Subtracting the mean first keeps all digits when rewards share a large offset.
        groups = (groups - groups[kept].mean()).where(kept, 0.0)
        sums, count = groups.sum(1, keepdim=True), kept.sum(1, keepdim=True)
        several, elsewhere = kept & (count > 1), count.sum() - count  # (P, k), (P, 1)
        from_others = (groups - (sums.sum() - sums) / elsewhere.clamp(min=1)).flatten()  # R - m
        leaning = (several & (elsewhere > 0)).flatten()
        advantages = advantages.lerp(from_others.where(leaning, advantages), lean)

        # The variances of this batch enter the averages
        means, several = sums / count.clamp(min=1), count[:, 0] > 1
        squares = ((groups - means).where(kept, 0.0) ** 2).sum(1)
        if several.sum() > 1:
            within = (squares / (count[:, 0] - 1))[several].mean()
            noise = within * (1 / count[several]).mean()
            d, between = self.decay, means[several].var() - noise  # of true means
            self._within = d * self._within + (1 - d) * within.item()
            self._between = d * self._between + (1 - d) * between.item()
        return advantages

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs to resume exactly here."""
        return {"decay": self.decay, "within": self._within, "between": self._between}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Resume from `state`. ValueError if it was made with another decay."""
        if state["decay"] != self.decay:
            raise ValueError(f"got a state with decay={state['decay']}, expected {self.decay}")
        self._within, self._between = state["within"], state["between"]


def standardized_advantages(
    advantages: torch.Tensor, applies: torch.Tensor | None = None
) -> torch.Tensor:
    """Advantages (B,) over their standard deviation: the learning rate then fits any reward scale.

        A_i / std_j(A_j)
        (REINFORCE++, arXiv 2501.03262, which also subtracts the mean: here the baseline has)

    The deviation holds the sample itself, so the expected gradient is only nearly that of the
    reward, divided by it. Equal advantages, which have none, become 0.

    Args:
        advantages: (B,).
        applies: (B,) bool, the samples that have one: the deviation is theirs. None is all.
    Returns:
        (B,) float32, detached.
    Raises:
        ValueError: fewer than two advantages.

    >>> standardized_advantages(torch.tensor([3.0, -3.0, 1.0, -1.0]))
    tensor([ 1.3416, -1.3416,  0.4472, -0.4472])
    """
    if advantages.ndim != 1 or len(advantages) < 2:
        raise ValueError(f"got advantages {tuple(advantages.shape)}, expected (B,) with B >= 2")
    advantages = advantages.detach().float()
    kept = advantages if applies is None else advantages[applies]
    deviation = (kept - kept.mean()).square().mean().sqrt()
    # Rounding gives equal numbers a deviation, too; of none it is NaN
    spread = deviation > 1e-6 * advantages.abs().max()
    return (advantages / deviation).where(spread, 0.0)


def adapted_beta(beta: float, kl: float, target: float, share: float, floor: float = 0.0) -> float:
    """The weight of the KL for the next batch: up where the KL is above its target, else down.

        beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)
        (Ziegler et al. 2019, arXiv 1909.08593, section 2.2)

    Args:
        beta: of this batch, reward units per nat.
        kl: mean KL(policy || anchor) of this batch, nats per completion.
        target: > 0, nats per completion.
        share: n / horizon, in (0, 1]: the batch's completions over those of the horizon.
        floor: >= 0, beta never falls below it.
    Raises:
        ValueError: an argument out of range, or not finite.

    >>> round(adapted_beta(0.1, kl=3.0, target=2.0, share=0.5), 6)
    0.11
    """
    if not (target > 0 and 0 < share <= 1 and 0 <= floor <= beta < float("inf")):
        raise ValueError(
            f"got beta={beta}, target={target}, share={share}, floor={floor}, expected target > 0, "
            "share in (0, 1] and 0 <= floor <= beta"
        )
    if not abs(kl) < float("inf"):
        raise ValueError(f"got kl={kl}, expected a finite number of nats")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return max(floor, beta * (1 + error * share))


def kl_penalized_rewards(
    rewards: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """The reward that REINFORCE ascends: the score minus beta times k1 of KL(policy || anchor).

        r_beta(x, y) = r(x, y) - beta log(pi(y|x) / pi_anchor(y|x))
        (WARP, arXiv 2406.16768, Algorithm 1)

    k1 is the estimate of the whole sequence. Inside the reward, detached and summed over tokens, it
    gives the exact gradient of -beta KL. As a loss it gives none. k2, k3 or token-local credit give
    another (see tests/test_reinforce.py).

    Args:
        rewards: (B,).
        logprobs, ref_logprobs: (B, T) of the sampled tokens under policy and anchor, at one
            temperature, in nats.
        mask: (B, T), true for the completion's tokens up to and including its end token.
        beta: >= 0, reward units per nat. It multiplies KL(policy || anchor), and the product is
            subtracted.
    Returns:
        (B,) float32, detached.
    Raises:
        ValueError: shapes do not fit, or beta < 0.

    >>> k1, mask = torch.tensor([[0.5, -0.1, float("nan")]]), torch.tensor([[True, True, False]])
    >>> kl_penalized_rewards(torch.tensor([1.0]), k1, torch.zeros(1, 3), mask, beta=0.5)
    tensor([0.8000])
    """
    if (
        logprobs.ndim != 2
        or not logprobs.shape == ref_logprobs.shape == mask.shape
        or rewards.shape != logprobs.shape[:1]
    ):
        raise ValueError(
            f"got rewards {tuple(rewards.shape)}, logprobs {tuple(logprobs.shape)}, ref_logprobs "
            f"{tuple(ref_logprobs.shape)}, mask {tuple(mask.shape)}, expected (B,) and three times "
            "(B, T)"
        )
    if not beta >= 0:
        raise ValueError(
            f"got beta={beta}, expected 0 or more: a negative beta rewards distance from the anchor"
        )
    if beta == 0:  # no KL at all: not even 0 times infinity, where the anchor forbids a token
        return rewards.detach().float().clone()
    k1 = (logprobs.detach().float() - ref_logprobs.detach().float()).masked_fill(~mask.bool(), 0.0)
    return rewards.detach().float() - beta * k1.sum(1)


def uncertainty_weights(variance: torch.Tensor, kind: str) -> torch.Tensor:
    """Weights for advantages from the variance of an ordinal reward model's score.

        none: 1   inverse_std: 1/sigma   inverse_variance: 1/sigma^2   one_plus_std: 1/(1 + sigma)

    A weight that depends on the sample changes the objective. The expected gradient is that of
    E[w(y) (R(y) - b)], not of E[R], and the baseline b is no longer neutral.

    Args:
        variance: (B,) >= 0, scores squared. The inverse kinds take it as 1e-6 at least, so a
            saturated score stays finite.
        kind: one of the four words above.
    Returns:
        (B,) float32, detached, > 0.
    Raises:
        ValueError: another word, or a negative or NaN variance.

    >>> uncertainty_weights(torch.tensor([4.0]), "one_plus_std")
    tensor([0.3333])
    """
    if kind not in ("none", "inverse_std", "inverse_variance", "one_plus_std"):
        raise ValueError(
            f"got kind={kind!r}, expected 'none', 'inverse_std', 'inverse_variance' or "
            "'one_plus_std'"
        )
    variance = variance.detach().float()
    if not bool((variance >= 0).all()):
        raise ValueError(f"got a variance of {variance.min().item():g}, expected 0 or more")
    if kind == "none":
        return torch.ones_like(variance)
    if kind == "one_plus_std":
        return 1 / (1 + variance.sqrt())
    return variance.clamp(min=1e-6) ** (-0.5 if kind == "inverse_std" else -1.0)


def importance_weights(
    logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    mask: torch.Tensor,
    limit: float = 2.0,
    kind: str = "sequence",
) -> torch.Tensor:
    """How much likelier each completion is under the policy than under the model that sampled it.

        sequence: w = min(limit, pi(y|x) / mu(y|x))   (truncated importance sampling, Ionides 2008)
        mask:     w = pi(y|x) / mu(y|x), and 0 where that is above the limit
        token:    w_t = min(limit, pi(y_t|x, y_<t) / mu(y_t|x, y_<t))

    E_mu[w f(y)] = E_pi[f(y)] as long as no ratio of a sequence passes the limit. The ratio of a
    sequence fades or explodes with its length; those of tokens do not, but leave out how much
    likelier the earlier tokens were: a bias that needs no limit. For samples of a copy of the
    policy in lower precision; 1 everywhere where the two agree.

    Args:
        logprobs, sampling_logprobs: (B, T) nats, of the policy and of the model that sampled;
            anything outside the mask.
        mask: (B, T), true for tokens of the completion.
        limit: > 0, bounds the variance; what it cuts off is bias.
        kind: one of the three words above.
    Returns:
        (B,) float32, detached; of tokens (B, T), 1 outside the mask.
    Raises:
        ValueError: shapes that differ, another word, or a limit that is not above 0.

    >>> logprobs, sampling_logprobs = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.1, -1.2]])
    >>> importance_weights(logprobs, sampling_logprobs, torch.tensor([[True, True]]))
    tensor([1.3499])
    """
    if logprobs.ndim != 2 or not logprobs.shape == sampling_logprobs.shape == mask.shape:
        shapes = [tuple(x.shape) for x in (logprobs, sampling_logprobs, mask)]
        raise ValueError(
            f"got logprobs, sampling_logprobs, mask {shapes}, expected (B, T) for all three"
        )
    if kind not in ("sequence", "token", "mask") or not limit > 0:
        raise ValueError(
            f"got kind={kind!r}, limit={limit}, expected 'sequence', 'token' or 'mask', and more "
            "than 0"
        )
    log_ratio = logprobs.detach().float() - sampling_logprobs.detach().float()  # (B, T)
    log_ratio = log_ratio.masked_fill(~mask.bool(), 0.0)
    ratio = (log_ratio if kind == "token" else log_ratio.sum(1)).exp()
    if kind == "mask":
        return ratio.masked_fill(ratio > limit, 0.0)
    return ratio.clamp(max=limit)


def reinforce_loss(
    logprobs: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor
) -> torch.Tensor:
    """The loss whose gradient is the REINFORCE estimate, one value per completion.

        L = -A sum_t mask_t log pi(y_t | x, y_<t)
        (Williams 1992; the completion as one action: arXiv 2402.14740)

    The tokens are summed, never averaged: dividing by the length would favour short good and long
    bad completions. The caller divides the sum over sequences by the size of the *whole* batch, so
    micro-batches change nothing.

    Args:
        logprobs: (B, T), nats; the only input that gets a gradient.
        mask: (B, T), true for the completion's tokens; elsewhere logprobs may hold anything.
        advantages: (B,), or (B, T) where each token's counts by a weight of its own.
    Returns:
        (B,) float32. Its value measures nothing; its gradient does.
    Raises:
        ValueError: shapes do not fit.

    >>> logprobs = torch.tensor([[-2.0, 0.0], [-0.5, -0.5]])
    >>> reinforce_loss(logprobs, torch.ones(2, 2), torch.tensor([1.0, -1.0])).mean()
    tensor(0.5000)
    """
    fits = advantages.shape in (logprobs.shape[:1], logprobs.shape)
    if logprobs.ndim != 2 or logprobs.shape != mask.shape or not fits:
        raise ValueError(
            f"got logprobs {tuple(logprobs.shape)}, mask {tuple(mask.shape)}, advantages "
            f"{tuple(advantages.shape)}, expected (B, T), (B, T) and (B,) or (B, T)"
        )
    # masked_fill and not multiplication: 0 * NaN is NaN.
    logprobs = logprobs.float().masked_fill(~mask.bool(), 0.0)
    advantages = advantages.detach().float()
    if advantages.ndim == 2:
        return -(advantages.masked_fill(~mask.bool(), 0.0) * logprobs).sum(1)
    return -advantages * logprobs.sum(1)
