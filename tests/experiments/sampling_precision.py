"""How biased are gradients from samples that a model drew in bfloat16, by length? (a real model)

    python tests/experiments/sampling_precision.py --model PATH --seeds 8    about 75 s per seed
    python tests/experiments/sampling_precision.py --report                  table and figure

--model is a folder with a causal language model. It was developed with one of 260 thousand
parameters, pretrained on children's stories. Forward passes only.

Each seed draws 512 completions of 448 tokens at most, from nothing but the begin token, with
minalign's sampler in bfloat16, and as many in float32 with other random numbers. The first T tokens
of each are its samples of length T: 16, 64, 128, 256, 448.

mu is what drew, pi the float32 model. The choices (minalign.reinforce.importance_weights):

- none: all weights 1;
- sequence: min(2, pi(y) / mu(y));
- token: min(2, pi(y_t) / mu(y_t));
- mask: pi(y) / mu(y), and 0 above 3.

They are judged by an expected gradient, E[sum_t w_t (f - E f) s_t], for three rewards f, each along
one direction of the logits that raises it; s_t is the derivative of log pi(y_t) along it:

- "log-prob": f is the sum of the tokens' log-probs over T; all logits grow in proportion. s_t is
  the log-prob plus the entropy;
- "word": f is how often the most frequent token comes, over T; its logit grows. s_t is 1 where it
  was drawn, minus its probability;
- "end": f is 1 where the completion ended; the end token's logit grows.

Bias = (estimate - truth) / gradient. It is 0 for a perfect choice, and -1 for one that leaves
nothing. The truth is known in two ways: by the same samples with the exact ratio as weight, which
has no bias (few samples carry it where texts are long), and by the float32 samples (much noise).
What is divided by is the mean of the float32 samples over all seeds. A constant reward is measured,
too: its E[sum_t w_t s_t] is 0 in truth, and is given in standard deviations of sum_t s_t.

Primary contrast: bias for "log-prob" at 256 tokens, sequence minus token, by the exact ratio.
Beside it: each choice, length and reward; mean weight, effective share of the samples (ESS), share
of weights cut, and the log ratio of a token and of a sequence.

All was fixed before the first run. A pilot on seed 100 had 256 completions, and much noise.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from seeds import bootstrap, main, panels, save, show

sys.path.insert(0, str(Path(__file__).parents[2]))
from minalign.data.chat import TokenizedPrompt, encode
from minalign.models.loading import end_token_ids, load_policy
from minalign.models.sampler import Sampler, Samples
from minalign.reinforce import importance_weights
from minalign.rollout import completion_logits

LENGTHS, COUNT, ROWS = (16, 64, 128, 256, 448), 512, 8  # ROWS: of a pass over full logits
LIMITS = {"sequence": 2.0, "token": 2.0, "mask": 3.0}
CHOICES, REWARDS = ("none", *LIMITS), ("log-prob", "word", "end")


def draw(policy, tokenizer, dtype: str, seed: int) -> tuple[Samples, torch.Tensor]:
    """COUNT samples, and log pi(y_t) - log mu(y_t) of each token (COUNT, T)."""
    config = SimpleNamespace(
        seed=seed,
        temperature=1.0,
        max_new_tokens=max(LENGTHS),
        micro_batch_size=32,
        sampler_dtype=dtype,
        importance="token",
        importance_limit=float("inf"),
    )
    sampler = Sampler(policy, end_token_ids(policy, tokenizer), config, torch.float32)
    begin = encode(tokenizer, "", end=False) or [tokenizer.bos_token_id or tokenizer.eos_token_id]
    samples = sampler.sample([TokenizedPrompt(begin)] * COUNT)
    return samples, samples.importance.log()


@torch.no_grad()
def tokens_of(policy, samples: Samples, word: int, ends: list[int]) -> dict[str, torch.Tensor]:
    """Reward and score of each token under pi: name -> (2, COUNT, T), 0 outside the mask."""
    parts, ends = [], torch.tensor(ends)
    for first in range(0, COUNT, ROWS):
        rows = samples.rows(slice(first, first + ROWS))
        logprobs, tokens = completion_logits(policy, *rows).float().log_softmax(2), rows[2]
        own = logprobs.gather(2, tokens[:, :, None])[:, :, 0]
        entropy = -(logprobs.exp() * logprobs).sum(2)
        is_word, is_end = (tokens == word).float(), torch.isin(tokens, ends).float()
        scores = [own + entropy, is_word - logprobs[:, :, word].exp()]
        scores.append(is_end - logprobs[:, :, ends].exp().sum(2))
        stacked = torch.stack([torch.stack([own, is_word, is_end]), torch.stack(scores)], 1)
        parts.append(stacked * rows[3])
    return dict(zip(REWARDS, torch.cat(parts, 2)))


def weights(log_ratio: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each choice's weights, and those of the exact ratio: (COUNT, T), or (COUNT, 1)."""
    pair = (log_ratio, torch.zeros_like(log_ratio), mask)
    result = {"none": torch.ones(len(mask), 1)}
    for kind, limit in LIMITS.items():
        weight = importance_weights(*pair, limit, kind)
        result[kind] = weight if kind == "token" else weight[:, None]
    return result | {"exact": importance_weights(*pair, float("inf"))[:, None]}


def facts(log_ratio: torch.Tensor, mask: torch.Tensor, choices: dict) -> dict[str, float]:
    ratio = choices["exact"]
    found = {
        "token |log ratio|": log_ratio.abs()[mask].mean(),
        "token log ratio, sd": log_ratio[mask].std(),
        "sequence log ratio, sd": log_ratio.sum(1).std(),
        "exact: mean weight": ratio.mean(),
        "sequence: cut": (ratio > LIMITS["sequence"]).float().mean(),
        "token: cut": (log_ratio.exp() > LIMITS["token"])[mask].float().mean(),
        "mask: cut": (ratio > LIMITS["mask"]).float().mean(),
        "tokens": mask.sum(1).float().mean(),
    }
    for kind in LIMITS:
        weight = choices[kind].expand_as(mask)[mask] if kind == "token" else choices[kind]
        found[f"{kind}: mean weight"] = weight.mean()
        found[f"{kind}: ESS"] = weight.mean() ** 2 / weight.square().mean()
    return {name: value.item() for name, value in found.items()}


def work(seed: int, model: str) -> dict:
    policy, tokenizer = load_policy(model)
    policy.eval().requires_grad_(False)
    ends = end_token_ids(policy, tokenizer)
    drawn, log_ratio = draw(policy, tokenizer, "bfloat16", 2 * seed)
    other, _ = draw(policy, tokenizer, "float32", 2 * seed + 1)
    word = other.tokens[other.mask & ~torch.isin(other.tokens, torch.tensor(ends))].mode()[0].item()
    mine, theirs = (tokens_of(policy, samples, word, ends) for samples in (drawn, other))
    result = {"model": Path(model).name, "word": tokenizer.decode([word])}
    for length in LENGTHS:
        mask = drawn.mask[:, :length]
        choices = weights(log_ratio[:, :length], mask)
        result[f"{length}"] = {"facts": facts(log_ratio[:, :length], mask, choices)}
        for name in REWARDS:

            def of(tokens, length=length, name=name):
                """Rewards (COUNT,) and scores (COUNT, T) of the first tokens."""
                reward, score = tokens[name][:, :, :length].double()
                # One end at most, and a mean over as many tokens for all: both are sums of tokens.
                return reward.sum(1) / (1 if name == "end" else length), score

            (reward, score), (reference, their_score) = of(mine), of(theirs)
            level, spread = reference.mean(), their_score.sum(1).std()
            truth = (reference - level) * their_score.sum(1) * COUNT / (COUNT - 1)
            cells = {"float32": truth.mean().item()}
            for kind, weight in choices.items():
                scores = (weight * score).sum(1)
                cells[kind] = ((reward - level) * scores).mean().item()
                cells[f"{kind}, constant"] = (scores.mean() / spread).item()
            result[f"{length}"][name] = cells
    return result


def report(results: dict[int, dict]) -> dict:
    seeds, summary = list(results.values()), {"facts": {}, "bias": {}, "constant reward": {}}
    summary |= {"model": seeds[0]["model"], "words": [seed["word"] for seed in seeds]}
    summary["contrasts"] = {}

    def add(part: str, name: str, values: np.ndarray) -> None:
        summary[part][name] = bootstrap(values)
        print(f"{name:64} {show(summary[part][name])}")

    def column(*keys: str) -> np.ndarray:
        cells = seeds
        for key in keys:
            cells = [cell[key] for cell in cells]
        return np.array([np.nan if cell is None else cell for cell in cells], dtype=float)

    for length in map(str, LENGTHS):
        for name in seeds[0][length]["facts"]:
            add("facts", f"{length} tokens: {name}", column(length, "facts", name))
        for reward in REWARDS:
            here, gradient = f"{length} tokens, {reward}", column(length, reward, "float32").mean()
            gradient = gradient or np.nan  # nothing has ended
            bias = {}
            for kind in (*CHOICES, "exact"):
                estimate = column(length, reward, kind)
                for truth in ("exact", "float32") if kind != "exact" else ("float32",):
                    bias[kind, truth] = (estimate - column(length, reward, truth)) / gradient
                    add("bias", f"{here}: {kind}, by {truth}", bias[kind, truth])
                constant = column(length, reward, f"{kind}, constant") + 0 * gradient
                add("constant reward", f"{here}: {kind}, constant reward", constant)
            for kind in ("token", "none"):
                difference = bias["sequence", "exact"] - bias[kind, "exact"]
                add("contrasts", f"{here}: bias of sequence - {kind}", difference)
    draw_figure(summary)
    return summary


def draw_figure(summary: dict) -> None:
    figure, axes = panels(2)
    looks = zip(CHOICES, ("o:", "s-", "^--", "v-."), ("0.5", "black", "tab:blue", "tab:orange"))
    for i, (kind, look, color) in enumerate(looks):
        for axis, part, ending in (
            (axes[0], "facts", f": {kind}: mean weight"),
            (axes[1], "bias", f", log-prob: {kind}, by exact"),
        ):
            cells = [summary[part].get(f"{length} tokens{ending}") for length in LENGTHS]
            if None in cells:  # the weights of "none"
                continue
            mean, low, high = np.array(
                [[cell[key] for cell in cells] for key in ("mean", "low", "high")], dtype=float
            )
            around = np.maximum((mean - low, high - mean), 0)  # rounding
            places = np.array(LENGTHS) * 1.03 ** (i - 1.5)
            axis.errorbar(places, mean, around, fmt=look, color=color, elinewidth=0.6, label=kind)
    for axis, level, label in zip(axes, (1, 0), ("mean weight", "bias of the gradient, log-prob")):
        axis.axhline(level, color="grey", lw=0.8)
        axis.set(xscale="log", xlabel="tokens", ylabel=label)
        axis.set_xticks(LENGTHS, map(str, LENGTHS))
        axis.minorticks_off()
    axes[1].legend(loc="best")
    save(figure, "sampling_precision")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model")
    given, sys.argv[1:] = parser.parse_known_args()
    reporting = {"--report", "-h", "--help"} & set(sys.argv)
    if not given.model and not reporting:
        sys.exit("--model PATH: give a folder with a causal language model")
    main("sampling_precision", __doc__, partial(work, model=given.model), report, seeds=8)
