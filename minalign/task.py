"""What a policy is trained on: the start policy, the reward, the prompts."""

from __future__ import annotations

import random
import typing
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .data import toy
from .data.chat import TokenizedPrompt, wants_chat
from .data.prompts import beginning, load_prompts, parse_span, tokenize_prompts
from .data.splits import Split
from .data.stops import stop_at
from .data.templates import roles_of
from .models.functions import columns_asked
from .models.generation import Stop
from .models.loading import end_token_ids, load_policy
from .models.padding import context_of
from .models.precision import autocast
from .models.rewards import RewardFunction, RewardSum, load_rewards, standardised_sum
from .reward import RewardModel
from .running.errors import require

if typing.TYPE_CHECKING:
    from .running.flag_groups import TaskFlags


class Task(NamedTuple):
    """The same for every run of one program.

    start: the start policy, which kl_sft is measured from; never changed.
    tokenizer: the start policy's.
    reward: what scores completions.
    train_prompts, eval_prompts: training and held-out prompts.
    prompt_tokens: (low, high) where only so many ids of a training prompt are used, drawn anew
        each time; None where all of them are.
    eos_token_ids: every token that ends a completion.
    measures: name -> a further measure of a whole text: the toy world's gold reward.
    stop: what finds a text that ends a completion; None where there is none.
    """

    start: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    reward: RewardModel | RewardFunction | RewardSum
    train_prompts: Sequence[TokenizedPrompt]
    eval_prompts: list[TokenizedPrompt]
    prompt_tokens: tuple[int, int] | None
    eos_token_ids: list[int]
    measures: dict[str, Callable[[str], float]]
    stop: Stop | None = None


def load_task(
    flags: TaskFlags,
    model: str,
    rewards: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int = 64,
) -> Task:
    """The start policy, the rewards and the prompts, loaded and printed.

    Args:
        flags: which prompts, how rewards are combined, and how completions are sampled.
        model: the start policy. "" is the toy world's, which is made on first use and kept.
        rewards: names of reward models, or module:function.
        device: where the start policy and the rewards go.
        dtype: of the forward passes.
        batch_size: completions per pass, where rewards are standardised by the start policy's.
    Raises:
        UserError: something cannot be loaded, or does not go together. It is named.
    """
    data = Split.from_flags(flags, columns_asked(rewards))
    start, tokenizer = load_policy(model or toy.start_policy_folder())
    start = start.to(device).requires_grad_(False)
    parts = load_rewards(rewards, device, flags.rm_average, flags.risk)
    for name, reward in parts.items():
        print(f"reward {name}: {reward.reading}")
    models = [reward for reward in parts.values() if isinstance(reward, RewardModel)]
    if flags.dataset:
        chat = wants_chat(tokenizer, flags.format)
        train, evaluation, column, columns = load_prompts(data, chat=chat)
        measures = {}
        for name, reward in parts.items():
            chat_model = reward in models and bool(reward.tokenizer.chat_template)
            if reward in models and chat_model == isinstance(train[0], str):
                form = "chat" if chat_model else "plain text"
                print(f"  note: {name} reads {form}, and scores these prompts as plain text")
    else:
        train, evaluation = toy.prompts(flags.seed, flags.eval_share, flags.split_seed)
        column, columns, measures = "", (None, None), toy.MEASURES

    default = "5-15" if column == "text" else ""
    span = parse_span("--prompt-tokens", flags.prompt_tokens or default)
    require(
        span is None or isinstance(train[0], str),
        "--prompt-tokens: chat prompts cannot be cut: leave it out",
    )
    limit = prompt_limit(start, models, flags)
    train = tokenize_prompts(tokenizer, train, limit, span, "training", columns[0])
    evaluation = evaluation[: 4 * flags.eval_prompts]  # not all of them: a few may be dropped
    evaluation = tokenize_prompts(tokenizer, evaluation, limit, span, "held-out", columns[1])
    extras = enumerate([*train.extras, *evaluation.extras[: flags.eval_prompts]])
    kinds = {roles_of(messages or ()): n for n, (messages, *_) in extras}
    kinds = [train[n] if n < len(train) else evaluation[n - len(train)] for n in kinds.values()]
    for reward in models:  # what a template refuses or changes is said before the first step
        reward.encode_rollout(tokenizer, kinds, [[]] * len(kinds))
    evaluation = list(evaluation[: flags.eval_prompts])
    if span:
        print(f"  of each the first {span[0]} to {span[1]} tokens, drawn anew each time")
        begin = tokenizer.bos_token_id is not None
        span = (span[0] + begin, span[1] + begin)
        lengths = random.Random("evaluation")
        evaluation = [beginning(prompt, span, lengths) for prompt in evaluation]

    eos_token_ids = end_token_ids(start, tokenizer)
    stop = stop_at(tokenizer, flags.stop)
    task = Task(start, tokenizer, None, train, evaluation, span, eos_token_ids, measures, stop)
    if flags.rm_weights or flags.standardize_rewards or len(parts) > 1:
        weights = flags.rm_weights or [1.0] * len(parts)
        require(
            len(weights) == len(parts),
            f"--rm-weights: got {len(weights)}, expected one for each of {len(parts)} rewards",
        )
        reward = RewardSum(parts, weights)
        # Those of warp.py --rm-of-run are not added up in training: each keeps its own scale.
        if flags.standardize_rewards or not getattr(flags, "rm_of_run", None):
            with autocast(device, dtype):
                reward = standardised_sum(parts, weights, task, flags, batch_size)
    else:
        (reward,) = parts.values()
    return task._replace(reward=reward)


def prompt_limit(start: torch.nn.Module, models: Sequence[RewardModel], flags: TaskFlags) -> int:
    """Tokens of the longest prompt that leaves room for a completion.

    --max-prompt-tokens may lower it. UserError where there is no room.
    """
    contexts = [context_of(start.config)]
    contexts += [model.context - 2 for model in models]  # an end token, a line break
    context = min((context for context in contexts if context), default=10**9)
    require(
        context > flags.max_new_tokens,
        f"--max-new-tokens {flags.max_new_tokens}: leaves no room for a prompt in a context of "
        f"{context}",
    )
    return min(context - flags.max_new_tokens, flags.max_prompt_tokens or 10**9)
