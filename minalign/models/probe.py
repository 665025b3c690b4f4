"""A trial of a policy at load: does it sample and score as its plain forward pass says?"""

import random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..running.errors import UserError, is_out_of_memory, require
from .folders import first_line
from .generation import completion_logprobs, generate
from .padding import context_of, pad

LENGTHS, NEW_TOKENS = (4, 1, 2), 2  # tokens of the prompts, and of their completions
TOLERANCE = 1e-3  # nats, and of a log-prob's size: float32 is off by 1e-5
WAY_OUT = "take a decoder with a key-value cache, such as Llama, Qwen or GPT-2"


def check_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Sample from three short prompts, and hold the log-probs to passes over one bare row each.

    Families differ in what they do with padding, positions and caches, and ignore in silence what
    they do not know. Only numbers show it. A second try decides, since a router's tie may fall
    either way.

    Args:
        model: in float32, with dropout off.
        tokenizer: the model's own.
        name: how the model was named, for errors.
    Raises:
        UserError: the model cannot be sampled from, gives other log-probs than its plain pass, or
            gives numbers that are not finite.
    """
    family = model.config.model_type
    for seed in range(2):
        try:
            got, expected = _both_ways(model, tokenizer, random.Random(seed))
        except Exception as error:  # whatever a family raises
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(
                f"{name}: got a {family} model, which cannot be sampled from ({reason}): {WAY_OUT}"
            ) from error
        if not expected.isfinite().all():
            weights = (n for n, p in model.named_parameters() if not p.isfinite().all())
            cause = next(weights, "no weight is at fault: they overflow")
            raise UserError(f"{name}: its logits are not finite ({cause}): mend the checkpoint")
        if torch.allclose(got, expected.expand_as(got), rtol=TOLERANCE, atol=TOLERANCE):
            return
    require(
        False,
        f"{name}: got a {family} model, which gives other log-probs beside padding or with a cache "
        f"than alone (by {(got - expected).abs().max():.2g} nats): {WAY_OUT}",
    )


@torch.no_grad()
def _both_ways(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, draws: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of three completions: (2, 3, T) as sampled and as scored, (3, T) of bare passes."""
    longest = (context_of(model.config) or 10**9) - NEW_TOKENS
    known = min(len(tokenizer), model.get_input_embeddings().num_embeddings)
    plain = [
        i for i in draws.sample(range(known), min(known, 64)) if i not in tokenizer.all_special_ids
    ]
    prompts = [draws.choices(plain or [0], k=min(length, longest)) for length in LENGTHS]
    rows = pad(prompts, "left", model.device)
    tokens, mask, sampled = generate(
        model,
        *rows,
        max_new_tokens=NEW_TOKENS,
        temperature=1.0,
        eos_token_ids=[],
        pad_token_id=0,
        uniforms=torch.tensor(
            [[draws.random() for _ in range(NEW_TOKENS)] for _ in prompts]
        ).double(),
    )
    scored = completion_logprobs(model, *rows, tokens, mask, 1.0)
    alone = []
    for prompt, completion in zip(prompts, tokens):
        whole = torch.cat([torch.tensor(prompt, device=model.device), completion])
        logits = model(input_ids=whole[None]).logits[0, len(prompt) - 1 : -1].float()
        alone.append(logits.log_softmax(1).gather(1, completion[:, None]).squeeze(1))
    return torch.stack([sampled, scored]), torch.stack(alone)
