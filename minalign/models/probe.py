"""A trial of a policy at load: does it sample and score as its plain forward pass says?"""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..running.errors import UserError, is_out_of_memory
from .folders import first_line
from .generation import generate
from .padding import context_of, pad
from .scoring import completion_logprobs

WAY_OUT = "take a decoder with a key-value cache, such as Llama, Qwen or GPT-2"


def check_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Sample from three short prompts, and hold the log-probs to passes over one bare row each.

    Families differ in what they do with padding, positions and caches, and ignore in silence what
    they do not know: only numbers show it. float32 is off by 1e-5 nats, 1e-3 are allowed. A second
    try decides, since a router's tie may fall either way.

    Raises:
        UserError: it cannot be sampled from, or log-probs differ or are not finite.
    """
    who = f"{name}: got a {model.config.model_type} model, which"
    for seed in range(2):
        try:
            ours, plain = _both_ways(model, tokenizer, torch.Generator().manual_seed(seed))
        except Exception as error:  # whatever a family raises
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{who} cannot be sampled from ({reason}): {WAY_OUT}") from error
        if not plain.isfinite().all():
            bad = (key for key, tensor in model.named_parameters() if not tensor.isfinite().all())
            raise UserError(
                f"{who} gives logits that are not finite: fix {next(bad, 'its weights')}"
            )
        if torch.allclose(ours, plain.expand_as(ours), rtol=1e-3, atol=1e-3):
            return
    gap = f"by {(ours - plain).abs().max():.2g} nats"
    raise UserError(
        f"{who} scores otherwise with padding and a cache than alone ({gap}): {WAY_OUT}"
    )


@torch.no_grad()
def _both_ways(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, draws: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of three completions: (2, 3, T) as sampled and as scored, (3, T) of bare passes."""
    T, context = 2, context_of(model.config) or 10**9
    known = min(len(tokenizer), model.get_input_embeddings().num_embeddings)
    ids, special = torch.randint(known, (64,), generator=draws).tolist(), tokenizer.all_special_ids
    ids = ([i for i in ids if i not in special] or ids) * 7
    prompts = [ids[: max(1, min(4, context - T))], ids[4:5], ids[5:7]]
    rows = pad(prompts, "left", model.device)
    settings = dict(max_new_tokens=T, temperature=1.0, eos_token_ids=[], pad_token_id=0)
    uniforms = torch.rand(3, T, dtype=torch.double, generator=draws)
    tokens, mask, sampled = generate(model, *rows, **settings, uniforms=uniforms)
    scored = completion_logprobs(model, *rows, tokens, mask, 1.0)
    alone = []
    for prompt, completion in zip(prompts, tokens):
        whole = torch.cat([torch.tensor(prompt, device=model.device), completion])
        logits = model(input_ids=whole[None]).logits[0, len(prompt) - 1 : -1].float()
        alone.append(logits.log_softmax(1).gather(1, completion[:, None]).squeeze(1))
    return torch.stack([sampled, scored]), torch.stack(alone)
