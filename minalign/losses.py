"""Reward-model losses and read-outs on plain tensors: Bradley-Terry and ordinal.

Shapes: B pairs or texts, K scores 1..K. Every function takes any floating dtype, computes and
returns float32, and leaves its inputs alone. It needs nothing but `import torch` to be pasted
elsewhere. Losses are per pair, in nats. The rating loss is per text and has no unit. The caller
averages.
"""

import torch


def bradley_terry_loss(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    margin: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of preferring the chosen text under Bradley-Terry.

        L = -log sigmoid(r_c - r_r - margin)
        (Bradley & Terry 1952; margin: Llama 2, arXiv 2307.09288, eq. 2)

    A constant reward has L = ln 2 = .6931 without a margin. With one, its floor is higher:
    log(1 + e^margin).

    Args:
        chosen_rewards, rejected_rewards: (B,).
        margin: (B,) or a number, in reward units: by how much the chosen reward should win. None
            is 0.
    Returns:
        (B,) float32, nats; finite for any finite input.
    Raises:
        ValueError: the two (or the margin) differ in shape.

    >>> bradley_terry_loss(torch.tensor([2.0, -200.0]), torch.tensor([2.0, 0.0]))
    tensor([  0.6931, 200.0000])
    """
    if chosen_rewards.ndim != 1 or chosen_rewards.shape != rejected_rewards.shape:
        raise ValueError(
            f"got chosen_rewards {tuple(chosen_rewards.shape)} and rejected_rewards "
            f"{tuple(rejected_rewards.shape)}, expected the same (B,): squeeze the last dimension "
            "of a one-label head"
        )
    if isinstance(margin, torch.Tensor) and margin.ndim and margin.shape != chosen_rewards.shape:
        raise ValueError(
            f"got margin {tuple(margin.shape)}, expected {tuple(chosen_rewards.shape)}: "
            "one margin per pair"
        )
    # Half precision goes up to float32. float64 stays, as its rewards may not fit into float32.
    dtype = torch.promote_types(chosen_rewards.dtype, torch.float32)
    margin = 0.0 if margin is None else margin
    difference = chosen_rewards.to(dtype) - rejected_rewards.to(dtype) - margin
    # Two huge rewards can differ by more than float32 holds. Up to there logsigmoid is exact,
    # unlike log(1 + exp(-x)).
    limit = torch.finfo(torch.float32).max
    return -torch.nn.functional.logsigmoid(difference.clamp(-limit, limit).float())


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
