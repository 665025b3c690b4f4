"""Log-probs of completions: `completion_logprobs`, the fast way of `rollout.sequence_logprobs`.

Nobody multiplies out logits that nobody needs. Tests hold it to its plain twin.
"""

import weakref

import torch
from transformers import PreTrainedModel

from ..logprobs import position_ids_from_mask, token_logprobs, token_logprobs_from_hidden
from .decoder import Decoder, read_texts
from .families import read_decoder
from .lora import adapters_in_place
from .padding import length_parts, tokens_per_pass
from .precision import dropout_off
from .proof import can_decode


def completion_logits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Logits that predict each token of sampled completions, aligned, in one pass with gradients.

    The result's [:, t] is the distribution that tokens[:, t] was drawn from: the logits one column
    earlier. So the first comes from the last column of the prompt, whose width (not length) is the
    same for all rows.

    Args:
        model: a causal language model; dropout is off, and its mode is put back.
        input_ids, attention_mask: (B, P), prompts padded on the left.
        tokens, mask: (B, T) of a Rollout.
    Returns:
        (B, T, V) in the model's dtype. Positions outside the mask hold anything.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> config = GPT2Config(vocab_size=7, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    >>> model, ids = GPT2LMHeadModel(config).eval(), torch.tensor([[3, 4, 5, 6]])
    >>> ones = torch.ones(1, 2)
    >>> logits = completion_logits(model, ids[:, :2], ones, ids[:, 2:], ones)
    >>> torch.equal(logits, model(ids).logits[:, 1:3])
    True
    """
    ids, full_mask = _side_by_side(input_ids, attention_mask, tokens, mask)
    how = {"position_ids": position_ids_from_mask(full_mask), "use_cache": False}
    with dropout_off(model):
        keep = tokens.shape[1] + 1
        logits = model(input_ids=ids, attention_mask=full_mask, logits_to_keep=keep, **how).logits
    return logits[:, -keep:-1]  # some models keep all of them


def _side_by_side(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, P + T) of prompts and completions, as a model takes them."""
    full_mask = torch.cat([attention_mask.bool(), mask.bool()], dim=1)
    return torch.cat([input_ids, tokens], dim=1).masked_fill(~full_mask, 0), full_mask.long()


def last_hidden_states(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, decoder: Decoder | None = None
) -> torch.Tensor:
    """What a model's body makes of texts: the hidden states that its head reads.

    Without gradients, our own decoder makes them, where it can.

    Args:
        model: a language model or a classifier, in the mode that it should run in.
        ids, mask: (B, n) long; padding may stand on either side.
        decoder: the model's, where it was read before.
    Returns:
        (B, n, D).
    """
    if decoder:
        return read_texts(decoder, ids, mask)
    if not torch.is_grad_enabled() and can_decode(model):
        with adapters_in_place(model) as whole:
            return read_texts(read_decoder(whole), ids, mask)
    positions = position_ids_from_mask(mask)
    how = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    return model.base_model(input_ids=ids, **how).last_hidden_state


def completion_logprobs(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    temperature: float,
    known_grad: torch.Tensor | None = None,
    decoder: Decoder | None = None,
) -> torch.Tensor:
    """Log-probs of sampled completions in one pass with gradients, without full logits.

        log pi(y_t | x, y_<t) = z_t[y_t] / tau - logsumexp(z_t / tau)

    Equals `token_logprobs(completion_logits(...), tokens, temperature)` inside the mask. Columns
    that are padding in every row are left out. The vocabulary is multiplied out for the tokens
    inside the mask alone, a chunk at a time. `sequence_logprobs` is the plain version.

    Args:
        model: a causal language model; dropout is off, and its mode is put back.
        input_ids, attention_mask: (B, P), prompts padded on the left.
        tokens, mask: (B, T) of a Rollout.
        temperature: tau > 0, the one that the tokens were sampled at.
        known_grad: (B, T) or None, see `token_logprobs_from_hidden`.
        decoder: see `last_hidden_states`.
    Returns:
        (B, T) float32, nats, 0 outside the mask.
    """
    mask = mask.bool()
    prompt_columns, width = attention_mask.bool().any(0), int(mask.any(0).sum())
    prompts = (input_ids[:, prompt_columns], attention_mask[:, prompt_columns])
    real = mask[:, :width]
    real_tokens = tokens[:, :width].masked_fill(~real, 0)
    if has_plain_head(model):
        with dropout_off(model):
            texts = _side_by_side(*prompts, real_tokens, real)
            hidden = last_hidden_states(model, *texts, decoder)
        hidden = hidden[:, -width - 1 : -1]  # (B, T, D)
        logprobs = token_logprobs_from_hidden(
            hidden[real][None],
            model.get_output_embeddings().weight,
            tokens[mask][None],
            temperature,
            known_grad=None if known_grad is None else known_grad[mask][None],
        )
    else:
        logits = completion_logits(model, *prompts, real_tokens, real)
        logprobs = token_logprobs(logits, real_tokens, temperature)[real]
    return torch.zeros_like(mask, dtype=torch.float32).masked_scatter(mask, logprobs)


@torch.no_grad()
def frozen_logprobs(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    temperature: float,
    micro_batch_size: int,
) -> torch.Tensor:
    """`completion_logprobs` under a frozen model, without a graph.

    At most `micro_batch_size` rows of like length go through the model at a time.
    """
    logprobs = torch.zeros_like(mask, dtype=torch.float32)
    lengths = (attention_mask.sum(1) + mask.sum(1)).tolist()
    with adapters_in_place(model) as whole:
        ours = has_plain_head(whole) and can_decode(whole)  # else full logits, by transformers
        decoder = read_decoder(whole) if ours else None  # rounded once for all parts
        for part in length_parts(lengths, micro_batch_size, tokens_per_pass(model)):
            rows = (tensor[part] for tensor in (input_ids, attention_mask, tokens, mask))
            logprobs[part] = completion_logprobs(whole, *rows, temperature, decoder=decoder)
    return logprobs


_PLAIN_HEADS: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are hidden states times the LM head's weight and nothing else.

    Some models scale their logits, squash them or add a bias: those take the way over full logits.
    It is tried out once for each model.
    """
    if model not in _PLAIN_HEADS:
        head = model.get_output_embeddings()
        ids = torch.tensor([[0, 1, 1]], device=model.device)
        plain = isinstance(head, torch.nn.Linear) and head.bias is None
        if plain := plain and model.base_model is not model:
            # The head's logits are replaced: a softcap, say, does nothing to small ones.
            large = torch.linspace(-1e3, 1e3, len(head.weight), device=ids.device).to(head.weight)
            read = []
            hook = head.register_forward_hook(
                lambda _, args, logits: read.append(args[0]) or large.expand_as(logits)
            )
            with hook, dropout_off(model), torch.autocast(model.device.type, enabled=False):
                hidden = model.base_model(input_ids=ids).last_hidden_state
                logits = model(input_ids=ids).logits
            plain = torch.equal(logits, large.expand_as(logits).to(logits))
            plain = plain and not (read[-1] - hidden).abs().max() > 1e-3 * hidden.abs().max()
        if not plain:
            print(
                f"  note: {model.config.model_type} does more to its logits than the LM head's "
                "product: log-probs take the way over full logits, which needs more memory"
            )
        _PLAIN_HEADS[model] = plain
    return _PLAIN_HEADS[model]
