"""What the log has of a training batch of completions."""

from __future__ import annotations

import typing

import torch
from tqdm import tqdm

from ..data.chat import decode_parts
from ..logprobs import kl_k1
from ..models.rewards import known_rewards
from ..running.errors import visible

if typing.TYPE_CHECKING:
    from ..models.sampler import Samples
    from ..reward import Scores
    from ..running.run import Run
    from ..task import Task


def measures(
    run: Run,
    task: Task,
    samples: Samples,
    scores: Scores,
    start_logprobs: torch.Tensor,
    anchor_logprobs: torch.Tensor,
) -> tuple[dict[str, float], dict]:
    """What metrics.jsonl has of the batch, each a mean over all processes' samples; and one sample.

    kl_sft, kl_anchor: nats per completion, one noisy k1 each. entropy: nats per token. length:
    tokens. importance_ess: effective over actual number of samples. importance_clipped: share of
    weights that the limit cuts. kl_peak: the largest kl_sft so far. Numbers that are not finite
    are left out of the means, and their samples are counted: not_finite. So are, uncounted, rewards
    where they do not apply: applies is the share where one does. The sample is the first, or the
    first of those that are not finite.
    """

    def over_tokens(values: torch.Tensor) -> torch.Tensor:
        return values.masked_fill(~samples.mask, 0.0).sum(1)  # (b,)

    rows = {
        "reward": scores.rewards,
        "kl_sft": over_tokens(kl_k1(samples.logprobs, start_logprobs)),
        "kl_anchor": over_tokens(kl_k1(samples.logprobs, anchor_logprobs)),
        "entropy": over_tokens(-samples.logprobs),
        "length": samples.mask.sum(1),
        "ended": samples.ended,
    }
    weighted = run.dtype != torch.float32 or run.config.sampler_dtype not in ("auto", "float32")
    if weighted:
        rows |= weight_columns(samples, run.config)
    if scores.applies is not None:
        rows["applies"] = scores.applies
    broken = ~torch.stack([row.float() for row in rows.values()], 1).isfinite().all(1)  # (b,)
    rows |= {f"reward {name}": values for name, values in scores.parts.items()}
    rows["reward"] = known_rewards(scores)
    table = torch.stack([row.float() for row in rows.values()], 1)
    means = finite_mean(run.ranks.gather(torch.cat([table, broken[:, None]], 1)))
    metrics = dict(zip([*rows, "not_finite"], means.tolist()))  # numbers leave the device once
    shown = int(broken.int().argmax()) if metrics["not_finite"] else 0
    pairs = list(zip(samples.prompts, samples.completions))
    texts = [hash((*prompt.ids, -1, *completion)) for prompt, completion in pairs]
    different = run.ranks.gather(torch.tensor(texts, device=run.device)).unique()
    metrics |= {
        "entropy": metrics["entropy"] / metrics["length"],
        "not_finite": round(metrics["not_finite"] * run.config.batch_size),
        "repeated": 1 - len(different) / run.config.batch_size,
        "tokens_per_second": metrics["length"] * run.config.batch_size / run.seconds,
        "advantage_std": 0.0,  # these two of a step that is left out
        "grad_norm": 0.0,
    }
    peak = max(run.counts.get("kl_peak", 0.0), metrics["kl_sft"])  # max keeps it where that is NaN
    run.counts["kl_peak"] = metrics["kl_peak"] = peak
    if run.config.target_kl:
        metrics["beta"] = run.counts["beta"]
    if weighted:
        name_fading_weights(run, metrics)
    prompt, completion = decode_parts(task.tokenizer, pairs[shown][0].ids, pairs[shown][1])
    sample = {"prompt": prompt, "completion": completion}
    reward, kl = table[shown, :2].tolist()
    if broken[shown]:
        count = f"{metrics['not_finite']} of {run.config.batch_size} completions"
        which = visible(f"reward {reward:g}, KL {kl:g} of {completion!r:.80}")
        tqdm.write(f"step {run.step}: not finite in {count}, first: {which}")
    return metrics, sample | {"reward": reward, "kl": kl}


def weight_columns(samples: Samples, config: typing.Any) -> dict[str, torch.Tensor]:
    """Of each completion (b,): mean weight, its square's mean, and the share that the limit cut."""
    weights, count = samples.importance, samples.mask.sum(1).clamp(min=1)  # (b, T)
    cut = (weights >= config.importance_limit) | (weights == 0)
    columns = {"importance": weights, "importance_ess": weights**2, "importance_clipped": cut}
    return {name: (x * samples.mask).sum(1) / count for name, x in columns.items()}


def name_fading_weights(run: Run, metrics: dict[str, float]) -> None:
    """Turn the mean square into ESS, and say once per run that weights are far below 1 on average.

    ESS / n = (mean w)^2 / mean w^2
    (Kish 1965)
    """
    mean, square = metrics["importance"], metrics["importance_ess"]
    metrics["importance_ess"] = mean**2 / square if square else 0.0
    if mean < 0.9 and not run.counts.get("fading") and run.first:
        run.counts["fading"] = run.step
        tqdm.write(
            f"step {run.step}: importance weights are {mean:.2f} on average, so gradients shrink: "
            "--importance token, or --sampler-dtype float32"
        )


def finite_mean(values: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the rows that are finite: one that is not does not take the others with it.

    Args:
        rows: (B,) bool, those that count; None for all.
    """
    values = values if rows is None else values[rows]
    finite = values.isfinite()
    return values.where(finite, 0.0).sum(0) / finite.sum(0)
