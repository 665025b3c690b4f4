"""Reward-model losses and read-outs on plain tensors: Bradley-Terry, Plackett-Luce, ordinal.

Shapes: B pairs, rankings or texts, K scores 1..K (or K ranked texts). Every function takes any
floating dtype, computes and returns float32, and leaves its inputs alone. It needs nothing but
`import torch` to be pasted elsewhere. Losses are per pair or ranking, in nats. The rating loss is
per text and has no unit. The caller averages.
"""

import torch


def bradley_terry_loss(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    margin: torch.Tensor | float | None = None,
    probability: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of preferring the chosen text under Bradley-Terry.

        L = -log sigmoid(r_c - r_r - margin)
        (Bradley & Terry 1952; margin: Llama 2, arXiv 2307.09288, eq. 2)
        with a probability p: -p log sigmoid(d) - (1 - p) log sigmoid(-d), d = r_c - r_r - margin

    A constant reward has L = ln 2 = .6931 without a margin. With one, its floor is higher:
    log(1 + e^margin) where p = 1. The least loss of a soft label is its entropy, at sigmoid(d) = p.

    Args:
        chosen_rewards, rejected_rewards: (B,).
        margin: (B,) or a number, in reward units: by how much the chosen reward should win. None
            is 0.
        probability: (B,) or a number in [0, 1], that the chosen text is the better one. None is 1.
    Returns:
        (B,) float32, nats; finite for any finite input.
    Raises:
        ValueError: the two (or the margin, or the probability) differ in shape, or a probability
            is none.

    >>> bradley_terry_loss(torch.tensor([2.0, -200.0]), torch.tensor([2.0, 0.0]))
    tensor([  0.6931, 200.0000])
    """
    if chosen_rewards.ndim != 1 or chosen_rewards.shape != rejected_rewards.shape:
        raise ValueError(
            f"got chosen_rewards {tuple(chosen_rewards.shape)} and rejected_rewards "
            f"{tuple(rejected_rewards.shape)}, expected the same (B,): squeeze the last dimension "
            "of a one-label head"
        )
    for name, given in (("margin", margin), ("probability", probability)):
        if isinstance(given, torch.Tensor) and given.ndim and given.shape != chosen_rewards.shape:
            raise ValueError(
                f"got {name} {tuple(given.shape)}, expected {tuple(chosen_rewards.shape)}: "
                f"one {name} per pair"
            )
    # Half precision goes up to float32. float64 stays, as its rewards may not fit into float32.
    dtype = torch.promote_types(chosen_rewards.dtype, torch.float32)
    margin = 0.0 if margin is None else margin
    difference = chosen_rewards.to(dtype) - rejected_rewards.to(dtype) - margin
    # Two huge rewards can differ by more than float32 holds. Up to there logsigmoid is exact,
    # unlike log(1 + exp(-x)).
    limit = torch.finfo(torch.float32).max
    difference = difference.clamp(-limit, limit).float()
    loss = -torch.nn.functional.logsigmoid(difference)
    if probability is None:
        return loss
    p = torch.as_tensor(probability, dtype=torch.float32, device=loss.device)
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(
            f"got a probability {p.min().item():g} to {p.max().item():g}, expected 0 to 1: the "
            "probability that the chosen text is the better one"
        )
    # -log sigmoid(-d) = d - log sigmoid(d), so that p = 1 is the loss above, bit for bit
    return loss + (1 - p) * difference


def plackett_luce_loss(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Negative log-likelihood of a ranking of K texts, the best first, under Plackett-Luce.

        L = -sum_{k < K} log(e^(r_k) / sum_{j >= k} e^(r_j))
        (Plackett 1975; Luce 1959)

    The best is drawn from all texts, the second from the others, and so on. Each draw is a
    Bradley-Terry comparison of text k with log sum_{j > k} e^(r_j), so K = 2 is bradley_terry_loss.
    The probabilities of all K! rankings sum to 1, and a constant reward has L = log K!.

    Args:
        scores: (K, B) rewards, row 0 of the best texts.
        mask: (K, B) bool, False beyond the end of a shorter ranking; None where all have K texts.
    Returns:
        (B,) float32, nats.
    Raises:
        ValueError: scores are not (K, B) with K >= 2, or the mask differs in shape, has a gap, or
            leaves fewer than two texts.

    >>> plackett_luce_loss(torch.zeros(3, 1))
    tensor([1.7918])
    """
    if scores.ndim != 2 or len(scores) < 2 or mask is not None and mask.shape != scores.shape:
        raise ValueError(
            f"got scores {tuple(scores.shape)} and mask {mask if mask is None else mask.shape}, "
            "expected (K, B) with K >= 2, and None or the same (K, B)"
        )
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    if not bool(mask[:2].all()) or bool((mask[1:] & ~mask[:-1]).any()):
        raise ValueError("got a mask with a gap, or with fewer than two texts of a ranking")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    limit = torch.finfo(torch.float32).max
    scores = scores.masked_fill(~mask, -limit)
    gaps = torch.stack([scores[k] - scores[k + 1 :].logsumexp(0) for k in range(len(scores) - 1)])
    losses = -torch.nn.functional.logsigmoid(gaps.clamp(-limit, limit).float())  # (K - 1, B)
    return losses.where(mask[1:], 0.0).sum(0)


def centering_penalty(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> torch.Tensor:
    """Penalty that fixes the free offset of Bradley-Terry rewards at zero.

        (r_c + r_r)^2        (idea: Eisenstein et al., arXiv 2312.09244; a weight of .01 is usual)

    Args:
        chosen_rewards, rejected_rewards: (B,).
    Returns:
        (B,) float32, reward units squared; the caller weights it.
    Raises:
        ValueError: the two differ in shape.

    >>> centering_penalty(torch.tensor([2.0, 1.0]), torch.tensor([1.0, -1.0]))
    tensor([9., 0.])
    """
    if chosen_rewards.ndim != 1 or chosen_rewards.shape != rejected_rewards.shape:
        raise ValueError(
            f"got chosen_rewards {tuple(chosen_rewards.shape)} and rejected_rewards "
            f"{tuple(rejected_rewards.shape)}, expected the same (B,): squeeze the last dimension "
            "of a one-label head"
        )
    return (chosen_rewards.float() + rejected_rewards.float()).square()


def ordinal_pairwise_loss(
    chosen_logits: torch.Tensor, rejected_logits: torch.Tensor, ties: str = "half"
) -> torch.Tensor:
    """Negative log-probability that the chosen text scores higher than the rejected one.

        L = -log[ P(S_c > S_r) + P(S_c = S_r) / 2 ],  S_c ~ softmax(z_c), S_r ~ softmax(z_r)
        (DPL, arXiv 2312.08358; "strict": no tie term)

    Scores are 1..K. Each text's is drawn from its own distribution.

    The best constant predictor has L = ln 2 = .6931 with ties="half", and -log((1 - 1/K) / 2) with
    ties="strict" (.7985 for K = 10). Above that a model has learned nothing. With random labels,
    the strict loss of free logits is lowest for a degenerate and a spread distribution. Pairs alone
    fix no scale: read a variance as uncertainty only with ratings.

    Args:
        chosen_logits, rejected_logits: (B, K), K >= 2; column k - 1 is score k.
        ties: "half" counts a tie as half a win, "strict" as a loss.
    Returns:
        (B,) float32, nats. Computed in log space throughout: there is no epsilon, so the gradient
        of the worst mistakes survives.
    Raises:
        ValueError: shapes differ, K < 2, or another word for `ties`.

    >>> flat = torch.zeros(1, 10)
    >>> ordinal_pairwise_loss(flat, flat), ordinal_pairwise_loss(flat, flat, ties="strict")
    (tensor([0.6931]), tensor([0.7985]))
    """
    if (
        chosen_logits.ndim != 2
        or chosen_logits.shape != rejected_logits.shape
        or chosen_logits.shape[1] < 2
    ):
        raise ValueError(
            f"got chosen_logits {tuple(chosen_logits.shape)} and rejected_logits "
            f"{tuple(rejected_logits.shape)}, expected the same (B, K) with K >= 2: "
            "a one-label head needs bradley_terry_loss"
        )
    if ties not in ("half", "strict"):
        raise ValueError(f"got ties={ties!r}, expected 'half' or 'strict'")
    score = torch.arange(chosen_logits.shape[1], device=chosen_logits.device)
    # (K, K): the row is the chosen text's score, the column the rejected text's
    chosen_higher = score[:, None] > score[None, :]
    tie = score[:, None] == score[None, :]
    tie_weight = 0.5 if ties == "half" else 0.0
    log_weight = (chosen_higher + tie_weight * tie).log()  # log 1, log 1/2 or log 0
    chosen_logprobs = chosen_logits.float().log_softmax(1)
    rejected_logprobs = rejected_logits.float().log_softmax(1)
    log_joint = chosen_logprobs[:, :, None] + rejected_logprobs[:, None, :]  # (B, K, K)
    return -(log_joint + log_weight).flatten(1).logsumexp(1)  # (B,)


def ordinal_rating_loss(logits: torch.Tensor, ratings: torch.Tensor) -> torch.Tensor:
    """Ranked probability score of a score distribution against a rating.

        RPS = sum_k (F(k) - G(k))^2,  F(k) = P(S <= k),  G = the rating's distribution function
        (Epstein 1969; equals EMD^2 on an ordered scale)

    It is proper, and it knows that 7 is near 8. A fractional rating is split between its two
    neighbours: 6.25 is score 6 with weight .75 and score 7 with .25.

    Args:
        logits: (B, K), column k - 1 is score k.
        ratings: (B,) in [1, K].
    Returns:
        (B,) float32, between 0 and K - 1.
    Raises:
        ValueError: shapes do not fit, or a rating lies outside [1, K] (or is NaN).

    >>> ordinal_rating_loss(torch.zeros(2, 3), torch.tensor([1.0, 2.0]))
    tensor([0.5556, 0.2222])
    """
    if logits.ndim != 2 or ratings.shape != logits.shape[:1]:
        raise ValueError(
            f"got logits {tuple(logits.shape)} and ratings {tuple(ratings.shape)}, "
            "expected (B, K) and (B,)"
        )
    num_scores = logits.shape[1]
    ratings = ratings.float()
    if not bool(((ratings >= 1) & (ratings <= num_scores)).all()):
        raise ValueError(
            f"got ratings from {ratings.min().item():g} to {ratings.max().item():g}, "
            f"expected 1 to {num_scores}: map them to the model's scores first"
        )
    score = torch.arange(1, num_scores + 1, device=logits.device)
    # (B, K): 0 below the rating, 1 above, linear between
    rating_cdf = (score + 1 - ratings[:, None]).clamp(0, 1)
    return (logits.float().softmax(1).cumsum(1) - rating_cdf).square().sum(1)


def expected_score(logits: torch.Tensor) -> torch.Tensor:
    """Mean of the score distribution: the reward of an ordinal reward model.

        E[S] = sum_k k softmax(z)_k

    Args:
        logits: (B, K), column k - 1 is score k.
    Returns:
        (B,) float32 in [1, K].
    Raises:
        ValueError: logits are not (B, K).

    >>> expected_score(torch.tensor([[0.0, 0.0, 100.0], [0.0, 0.0, 0.0]]))
    tensor([3., 2.])
    """
    if logits.ndim != 2:
        raise ValueError(f"got logits {tuple(logits.shape)}, expected (B, K)")
    score = torch.arange(1, logits.shape[1] + 1, device=logits.device)
    return (logits.float().softmax(1) * score).sum(1)


def score_variance(logits: torch.Tensor) -> torch.Tensor:
    """Variance of the score distribution: how undecided an ordinal reward model is about one text.

        Var[S] = sum_k softmax(z)_k (k - E[S])^2

    Args:
        logits: (B, K), column k - 1 is score k.
    Returns:
        (B,) float32 in [0, (K - 1)^2 / 4], scores squared.
    Raises:
        ValueError: logits are not (B, K).

    >>> score_variance(torch.tensor([[0.0, 0.0, 1000.0], [0.0, 0.0, 0.0]]))
    tensor([0.0000, 0.6667])
    """
    if logits.ndim != 2:
        raise ValueError(f"got logits {tuple(logits.shape)}, expected (B, K)")
    score = torch.arange(1, logits.shape[1] + 1, device=logits.device)
    probabilities = logits.float().softmax(1)
    mean = (probabilities * score).sum(1, keepdim=True)
    return (probabilities * (score - mean).square()).sum(1)


def risk_adjusted_score(logits: torch.Tensor, tau: float) -> torch.Tensor:
    """Certainty equivalent of the score distribution at risk tolerance tau: a pessimistic reward.

        r~ = -tau log sum_k softmax(z)_k e^(-k / tau)          (arXiv 2606.09073)

    tau -> inf is expected_score, tau -> 0 the lowest score. For large tau it is about
    E[S] - Var[S] / (2 tau).

    Args:
        logits: (B, K), column k - 1 is score k.
        tau: > 0, in scores; inf is the mean.
    Returns:
        (B,) float32 in [1, E[S]].
    Raises:
        ValueError: logits are not (B, K), or tau is not above 0.

    >>> certain_to_a_tenth = torch.tensor([[0.1, 1e-9, 0.9]]).log()
    >>> [round(risk_adjusted_score(certain_to_a_tenth, tau).item(), 3) for tau in (0.1, 1.0, 1e6)]
    [1.23, 2.506, 2.8]
    """
    if not tau > 0:
        raise ValueError(f"got tau {tau}, expected a number above 0, or inf: the mean")
    if logits.ndim != 2:
        raise ValueError(f"got logits {tuple(logits.shape)}, expected (B, K)")
    score = torch.arange(1, logits.shape[1] + 1, device=logits.device)
    probabilities = logits.float().softmax(1)
    mean = (probabilities * score).sum(1)
    if tau == float("inf"):
        return mean
    tau = min(max(tau, 1e-30), 1e12)  # beyond, float32 knows no difference
    if tau < logits.shape[1]:
        return 1 - tau * (logits.float().log_softmax(1) - (score - 1) / tau).logsumexp(1)
    # The logarithm is near 0, and would be lost in rounding: taken about the mean, it is not
    return mean - tau * (probabilities * torch.expm1((mean[:, None] - score) / tau)).sum(1).log1p()
