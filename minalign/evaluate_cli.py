"""Policies compared on the same held-out prompts with the same random numbers, by a reward model.

    python -m minalign.evaluate --model runs/policy-1 runs/policy-2 --rm runs/rm-1                       the toy world
    python -m minalign.evaluate --model runs/my-policy --start path-or-id --rm runs/my-rm --dataset prompts.jsonl

Give the flags of the data, --temperature and --max-new-tokens as in training: the held-out prompts then are the same. Every
policy is set against the start policy, and against the first of --model. As a control, the start policy is set against itself
with other random numbers: differences no larger than that are noise. The folder gets results.json and samples.jsonl.
"""

from __future__ import annotations

import gc
import json
import types
import typing
from dataclasses import dataclass

from tqdm import tqdm

from .common import autocast, pick_device, pick_dtype, require, show_config
from .flags import DataFlags, flag, parse_flags
from .runs import JsonLines, new_run, write_config, write_whole

if typing.TYPE_CHECKING:  # heavy imports come after parsing: --help and a wrong flag answer at once
    import torch


@dataclass
class Config(DataFlags):
    """Evaluation."""

    model: list[str] | None = flag(None, "policies: runs, folders or hub ids; the first is what the others are compared with")
    start: str = flag("", "policy that the KL is measured to (default: the toy world's)")
    rm: list[str] | None = flag(None, "reward: a run of train_rm.py, a folder, a hub id, or a Python module:function; may be "
                                "several (default: the toy world's reward model)")  # fmt: skip
    rm_weights: list[float] | None = flag(None, "weights of several rewards, each standardised (default: 1 each)")
    rm_average: bool = flag(False, "of several reward models take one whose weights are their average (WARM)")
    standardize_rewards: bool = flag(False, "by mean and deviation of the start policy's rewards")
    prompt_column: str = flag("", "column of the prompts (default: prompt, messages, chosen or text)")
    prompt_tokens: str = flag("", "so many first tokens of each text (default for a column text: 5-15)")
    max_prompt_tokens: int | None = flag(None, "longer prompts are dropped and counted (default: what the context leaves)",
                                         within="[1, inf)")  # fmt: skip
    eval_prompts: int = flag(128, "held-out prompts, one completion each", within="[2, inf)")
    max_new_tokens: int | None = flag(None, "tokens of a completion (default: 64, in the toy world 32)", within="[1, inf)")
    temperature: float = flag(1.0, "of sampling and of every log-prob", within="(0, inf)")
    batch_size: int = flag(16, "completions sampled at a time: memory, not the result", within="[1, inf)")
    seed: int = flag(0, "seed of sampling and of the intervals; the control samples with the next one")
    out: str = flag("", "folder for results.json and samples.jsonl (default: the next free runs/evaluation-N)")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("auto", "forward precision: auto is bfloat16 on CUDA", ("auto", "float32", "bfloat16"))


class Measured(typing.NamedTuple):
    """One policy: means, in the order of the table; samples, rewards and completions, one a prompt; verdict in words."""

    metrics: dict[str, float]
    samples: list
    rewards: list[float]
    verdict: str


TABLE = {  # metric -> what the table calls it; what is not listed follows under its own name
    "reward": "reward",
    "kl_sft": "kl_sft, exact (nats a completion)",
    "kl_sft_se": "  its standard error",
    "kl_k1": "kl_sft, sampled k1",
    "kl_k1_se": "  its standard error",
    "length": "length (tokens)",
    "ended": "ended by itself (share)",
    "entropy": "entropy (nats a token)",
    "distinct_1": "distinct_1",
    "distinct_2": "distinct_2",
    "repetition": "repetition",
    "self_similarity": "self_similarity",
}


def measure(policy: torch.nn.Module, task, config: Config, seed: int) -> Measured:
    """Sample one completion for each held-out prompt of a minalign.task.Task, and measure.

    kl_sft: KL(policy || start), nats a completion, the exact KL of each next-token distribution summed over the sampled
    prefixes. kl_k1: log pi(y|x) - log pi_start(y|x) of the sample itself, the same mean with more noise. Their standard errors
    are deviation / sqrt(prompts). entropy: of each next-token distribution, mean over all tokens. The rest: measures.py.
    """
    import torch

    from .evaluate import Sample, both_logits, decode_parts, sample_completions
    from .logprobs import exact_kl, kl_k1, token_entropy, token_logprobs
    from .measures import collapse_verdict, distinct_n, repetition, self_similarity

    batches, completions, ended = sample_completions(
        policy, task.tokenizer, task.eval_prompts, temperature=config.temperature, max_new_tokens=config.max_new_tokens,
        eos_token_ids=task.eos_token_ids, seed=seed, batch_size=config.batch_size,
    )  # fmt: skip
    kls, k1s, entropies, lengths = [], [], [], []  # of each completion, summed over its tokens
    for logits, start_logits, tokens, mask in both_logits(policy, task.start, batches):
        logprobs = [token_logprobs(z, tokens, config.temperature) for z in (logits, start_logits)]
        exact = exact_kl(logits, start_logits, config.temperature)  # (B, T), as the two others
        per_token = [exact, kl_k1(*logprobs), token_entropy(logits, config.temperature)]
        for sums, values in zip((kls, k1s, entropies), per_token):
            sums += values.masked_fill(~mask, 0.0).sum(1).tolist()
        lengths += mask.sum(1).tolist()
    scores = task.reward.score_rollout(task.tokenizer, task.eval_prompts, completions, config.batch_size)
    rewards, count = scores.rewards.tolist(), len(completions)
    broken = int((~scores.rewards.isfinite()).sum())
    require(not broken, f"--rm: {broken} of {count} rewards are not finite: mend the reward, or leave it out")
    texts = [decode_parts(task.tokenizer, prompt.ids, y) for prompt, y in zip(task.eval_prompts, completions)]

    def mean_and_error(values):
        values = torch.tensor(values, dtype=torch.double)
        return values.mean().item(), values.std().item() / count**0.5

    kl, kl_se = mean_and_error(kls)
    k1, k1_se = mean_and_error(k1s)
    metrics = {
        "reward": sum(rewards) / count,
        "kl_sft": kl, "kl_sft_se": kl_se, "kl_k1": k1, "kl_k1_se": k1_se,
        "length": sum(lengths) / count,
        "ended": sum(ended) / count,
        "entropy": sum(entropies) / sum(lengths),
        "distinct_1": distinct_n(completions, 1),
        "distinct_2": distinct_n(completions, 2),
        "repetition": repetition(completions),
        "self_similarity": self_similarity(completions),
    }  # fmt: skip
    metrics |= {f"reward {name}": values.mean().item() for name, values in scores.parts.items()}
    for name, of_text in task.measures.items():
        metrics[name] = sum(of_text(prompt + completion) for prompt, completion in texts) / count
    samples = [Sample(*text, reward, kl) for text, reward, kl in zip(texts, rewards, kls)]
    return Measured(metrics, samples, rewards, collapse_verdict(completions, metrics["entropy"]))


def compare(first: Measured, second: Measured, seed: int) -> dict:
    """Second against first by reward, prompt by prompt: mean difference and win rate, each with its 95% interval."""
    from .measures import paired_bootstrap, win_scores

    wins = win_scores(first.rewards, second.rewards)
    return {
        "reward_difference": paired_bootstrap(first.rewards, second.rewards, seed)._asdict(),
        "win_rate": paired_bootstrap([0.0] * len(wins), wins, seed)._asdict(),
    }


def load_policies(config: Config, task, device: torch.device) -> typing.Iterator[tuple[str, torch.nn.Module]]:
    """The policies of --model, one after the other. UserError for one that cannot be compared with the start policy."""
    from .checkpoint import load_policy

    longest = max(len(prompt.ids) for prompt in task.eval_prompts) + config.max_new_tokens
    for name in tqdm(config.model, desc="policies", unit="policy", leave=False):
        policy, tokenizer = load_policy(name)
        require(tokenizer.get_vocab() == task.tokenizer.get_vocab(),
                f"--model {name}: its vocabulary is not that of --start: a KL needs the same tokens")  # fmt: skip
        context = getattr(policy.config, "max_position_embeddings", None) or longest
        require(longest <= context, f"--model {name}: a context of {context} tokens, {longest} are needed: lower "
                "--max-new-tokens or --max-prompt-tokens")  # fmt: skip
        yield name, policy.to(device).requires_grad_(False)
        del policy  # one at a time in memory, beside the start policy
        gc.collect()


def short(name: str) -> str:
    """A path as a column's heading: its end, where it is long.

    >>> short("runs/policy-1"), short("experiments/2026-11/fixed-0.3-seed-4")
    ('runs/policy-1', '...xed-0.3-seed-4')
    """
    return name if len(name) <= 17 else f"...{name[-14:]}"


def measures_table(measured: dict[str, Measured], count: int) -> str:
    """A line for each measure, a column for each policy."""
    columns = list(measured)
    metrics = measured[columns[0]].metrics
    label = {**{name: name for name in metrics}, **TABLE}
    width = 2 + max(len(label[name]) for name in metrics)
    lines = [f"{f'{count} held-out prompts':{width}}" + "".join(f"{short(name):>19}" for name in columns)]
    for name in metrics:
        lines.append(f"{label[name]:{width}}" + "".join(f"{measured[column].metrics[name]:19.3f}" for column in columns))
    return "\n".join(lines)


def comparison_line(name: str, comparison: dict) -> str:
    """`name`, mean difference of rewards and win rate, each with its interval."""
    difference, wins = comparison["reward_difference"], comparison["win_rate"]
    return (
        f"{name}  {difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]  "
        f"{wins['mean']:.1%} [{wins['low']:.1%}, {wins['high']:.1%}]"
    )


def resolve(config: Config) -> Config:
    """Fill in what depends on other flags; UserError for flags that make no sense, alone or together."""
    require(bool(config.model), "--model is missing: one or more policies to evaluate")
    for name in config.model:
        require(config.model.count(name) == 1, f"--model {name}: given twice")
    require("start" not in config.model, "--model start: is a name of the table: write ./start")
    for name in ("subset", "eval_split"):
        require(bool(config.dataset) or not getattr(config, name), f"--{name.replace('_', '-')} needs --dataset")
    require(bool(config.dataset) or config.format != "chat", "--format chat needs --dataset: the toy world is plain text")
    require(bool(config.dataset) or not config.start, f"--start {config.start}: needs --dataset, too: the prompts")
    require(not config.dataset or bool(config.start and config.rm), f"--dataset {config.dataset}: needs --start and --rm, too")
    require(bool(config.rm) or not (config.rm_average or config.rm_weights), "--rm-average, --rm-weights: need --rm")
    config.max_new_tokens = config.max_new_tokens or (64 if config.dataset else 32)
    return config


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, load, measure, compare, print and save."""
    config = resolve(parse_flags(Config, __doc__, argv))
    device, reason = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)

    from . import toy
    from .task import load_task

    rewards = config.rm or [str(toy.folder() / "reward-model")]
    require(bool(config.rm) or (toy.folder() / "reward-model").exists(),
            "--rm is missing, and the toy world has no reward model yet: give one, or run train_policy.py first")  # fmt: skip
    out = new_run(config.out, "evaluation")
    show_config(config, device, reason, dtype)
    as_in_training = {"model": config.start, "micro_batch_size": config.batch_size, "uncertainty": "none"}
    task = load_task(types.SimpleNamespace(**vars(config) | as_in_training), rewards, device, dtype)
    write_config(out, config, device, dtype)

    with autocast(device, dtype):
        measured = {"start": measure(task.start, task, config, config.seed)}
        control = measure(task.start, task, config, config.seed + 1)
        measured |= {name: measure(policy, task, config, config.seed) for name, policy in load_policies(config, task, device)}
    pairs = [("start", name) for name in config.model] + [(config.model[0], name) for name in config.model[1:]]
    comparisons = [{"model": b, "against": a} | compare(measured[a], measured[b], config.seed) for a, b in pairs]
    null = compare(measured["start"], control, config.seed)
    covers = null["reward_difference"]["low"] <= 0 <= null["reward_difference"]["high"]

    print("\n" + measures_table(measured, len(task.eval_prompts)))
    names = [f"{short(b)} minus {short(a)}" for a, b in pairs] + ["control: start minus start"]
    width = max(map(len, names))
    print(f"\n{'paired by prompt, 95% intervals':{max(width, 31)}}  reward difference, share of prompts won")
    for name, comparison in zip(names, [*comparisons, null]):
        print(comparison_line(f"{name:{max(width, 31)}}", comparison))
    print(
        "the control, the start policy with other random numbers, "
        + ("covers 0, as it should" if covers else "does not cover 0, as in one evaluation of twenty: try another --seed")
    )
    print("\ncollapse")
    for name, one in measured.items():
        print(f"  {short(name):17}  {one.verdict}")

    results = {
        "prompts": len(task.eval_prompts),
        "models": {name: one.metrics | {"verdict": one.verdict} for name, one in measured.items()},
        "comparisons": comparisons,
        "control": null | {"covers_zero": covers},
    }
    write_whole(out / "results.json", json.dumps(results, indent=2) + "\n")
    lines = JsonLines(out / "samples.jsonl")
    for name, one in measured.items():
        for sample in one.samples:
            lines.append({"model": name} | sample._asdict())
    print(f"\nsaved {out}/results.json, {out}/samples.jsonl")
