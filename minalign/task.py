"""What a policy is trained on: the start policy, the reward, the prompts."""

import copy
import random
from typing import NamedTuple

import torch
from tqdm import tqdm

from . import toy
from .chat import TokenizedPrompt, encode_prompt, wants_chat
from .checkpoint import end_token_ids, load_policy
from .common import autocast, require
from .data import Split, load_prompts
from .evaluate import sample_completions
from .flags import parse_span
from .lora import AdapterView, adapter_parameters
from .reward import RewardModel
from .rewards import RewardFunction, RewardSum, load_rewards


class Task(NamedTuple):
    """The same for every run of one program."""

    start: torch.nn.Module  # the policy that kl_sft is measured from; never changed
    tokenizer: object
    reward: RewardModel | RewardFunction | RewardSum
    train_prompts: list[TokenizedPrompt]
    eval_prompts: list[TokenizedPrompt]
    prompt_tokens: tuple[int, int] | None  # of each training prompt only so many ids, drawn anew each time
    eos_token_ids: list[int]
    measures: dict  # further functions of a whole text, by name: the toy world's gold reward


def load_task(config, rewards: list[str], device: torch.device, dtype: torch.dtype) -> Task:
    """Load by the flags of train_policy.py; without --dataset, the toy world, made on first use and kept."""
    start, tokenizer = load_policy(config.model or toy.start_policy_folder())
    start = start.to(device).requires_grad_(False)
    eos_token_ids = end_token_ids(start, tokenizer)
    parts = load_rewards(rewards, device, config.rm_average)
    for name, reward in parts.items():
        print(f"reward {name}: {reward.reading}")
        require(config.uncertainty == "none" or reward.num_labels > 2,
                f"--uncertainty {config.uncertainty}: --rm {name} is no distribution over scores: train one with "
                "--loss ordinal")  # fmt: skip
    if config.dataset:
        data = Split(config.dataset, config.split, config.eval_split, config.eval_share, config.split_seed, config.subset)
        chat = wants_chat(tokenizer, config.format)
        train, evaluation, column = load_prompts(data, chat=chat, column=config.prompt_column)
        measures = {}
        for name, r in parts.items():
            if isinstance(r, RewardModel) and r.tokenizer.chat_template and isinstance(train[0], str):
                print(f"  note: {name} was trained on chat, and scores these prompts as plain text")
    else:
        train, evaluation = toy.prompts(seed=config.seed, eval_share=config.eval_share, split_seed=config.split_seed)
        column, measures = "", {"gold": toy.gold_reward, "grammatical": lambda text: float(toy.parse(text) is not None)}

    span = parse_span("--prompt-tokens", config.prompt_tokens or ("5-15" if column == "text" else ""))
    require(span is None or isinstance(train[0], str), "--prompt-tokens: chat prompts cannot be cut: leave it out")
    contexts = [getattr(start.config, "max_position_embeddings", None)]
    contexts += [reward.context - 2 for reward in parts.values() if isinstance(reward, RewardModel)]  # an end, a line break
    room = min(context for context in contexts if context) - config.max_new_tokens if any(contexts) else None
    limit = min(limit for limit in (config.max_prompt_tokens, room, 10**9) if limit is not None)
    require(
        limit > 0,
        f"--max-new-tokens {config.max_new_tokens}: leaves no room for a prompt in a context of {limit + config.max_new_tokens}",
    )
    train = tokenize_prompts(tokenizer, train, limit, span, "training")
    evaluation = tokenize_prompts(tokenizer, evaluation[: 4 * config.eval_prompts], limit, span, "held-out")[
        : config.eval_prompts
    ]
    if span:
        print(f"  of each the first {span[0]} to {span[1]} tokens, drawn anew each time")
        begin = tokenizer.bos_token_id is not None
        span = (span[0] + begin, span[1] + begin)
        lengths = random.Random("evaluation")
        evaluation = [beginning(prompt, span, lengths) for prompt in evaluation]

    reward = next(iter(parts.values()))
    if config.rm_weights or config.standardize_rewards or len(parts) > 1:
        weights = config.rm_weights or [1.0] * len(parts)
        require(len(weights) == len(parts), f"--rm-weights: got {len(weights)}, expected one for each of {len(parts)} rewards")
        reward = RewardSum(parts, weights)
        lengths = random.Random("standardise")
        prompts = random.Random(config.seed).sample(train, min(256, len(train)))
        prompts = [beginning(prompt, span, lengths) for prompt in prompts]
        with autocast(device, dtype):
            _, completions, _ = sample_completions(
                start, tokenizer, prompts, temperature=config.temperature, max_new_tokens=config.max_new_tokens,
                eos_token_ids=eos_token_ids, seed=config.seed, batch_size=config.micro_batch_size,
            )  # fmt: skip
            reward.fit(
                {n: r.score_rollout(tokenizer, prompts, completions, config.micro_batch_size).rewards for n, r in parts.items()}
            )
        for name, mean, std in zip(parts, reward.means, reward.stds):
            print(
                f"reward {name}: {mean:.6g} +- {std:.4g} on {len(prompts)} samples of the start policy: standardised by these"
            )
    return Task(start, tokenizer, reward, train, evaluation, span, eos_token_ids, measures)


def tokenize_prompts(tokenizer, prompts: list, limit: int, span: tuple[int, int] | None, kind: str) -> list[TokenizedPrompt]:
    """Prompts as token ids; those over `limit` tokens (or, with a span, under its lower end) are dropped and counted."""
    progress = tqdm(prompts, desc=f"{kind} prompts", leave=False)
    rows = [TokenizedPrompt(encode_prompt(tokenizer, p), p if isinstance(p, list) else None) for p in progress]
    if span is None:
        kept = [row for row in rows if 0 < len(row.ids) <= limit]
        reason = f"longer than {limit} tokens" + ", or empty" * any(not row.ids for row in rows)
    else:
        kept = [row for row in rows if len(row.ids) - (row.ids[:1] == [tokenizer.bos_token_id]) >= span[0]]
        reason = f"shorter than {span[0]} tokens"
        require(span[1] < limit, f"--prompt-tokens {span[1]}: expected fewer than {limit}: shorten it or --max-new-tokens")
    if len(kept) < len(rows):
        print(f"  dropped {len(rows) - len(kept)} of {len(rows)} {kind} prompts: {reason}")
    require(bool(kept), f"no {kind} prompts left: all are {reason}: raise --max-prompt-tokens, or lower --max-new-tokens")
    return kept


def beginning(prompt: TokenizedPrompt, span: tuple[int, int] | None, rng: random.Random) -> TokenizedPrompt:
    """The first ids of a text, low..high of them, drawn by `rng`; the prompt itself where there is no span."""
    return prompt if span is None else TokenizedPrompt(prompt.ids[: rng.randint(*span)])


def trained_and_anchor(
    policy: torch.nn.Module, start: torch.nn.Module, config
) -> tuple[list[torch.nn.Parameter], torch.nn.Module]:
    """What is trained of a policy, and the model that its KL is measured from, which begins as the policy is now.

    With adapters the anchor is the policy itself with its adapters off, or with an average of them. A fixed anchor that would be
    a second copy of `start` is `start`.
    """
    if config.lora_rank:
        trained = adapter_parameters(policy)
        if config.anchor == "fixed":
            return trained, start if isinstance(start, AdapterView) else AdapterView(policy, None)
        return trained, AdapterView(policy, [parameter.detach().clone() for parameter in trained])
    trained = list(policy.parameters())
    if config.anchor == "fixed" and all(torch.equal(a, b) for a, b in zip(trained, start.parameters())):
        return trained, start
    return trained, copy.deepcopy(policy).requires_grad_(False)
