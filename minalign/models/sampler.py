"""How a training step's completions are drawn, in whatever precision."""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from .. import reinforce, rollout
from ..data.chat import TokenizedPrompt
from . import precision
from .padding import pad


class Samples(NamedTuple):
    """This process's completions of a batch: B rows, prompts of P columns, completions of T.

    Attributes:
        prompts: B prompts.
        completions: ids of B completions without their end token or stop text.
        ended: (B,) bool, which of them have one.
        input_ids, attention_mask: (B, P) long, the prompts padded on the left.
        tokens, mask: (B, T) of a Rollout, end tokens and stop texts included.
        logprobs: (B, T) float32, nats, the policy's own; 0 outside the mask, without a graph.
        importance: (B, T) float32, what each token counts; 1 where the policy itself drew it.
    """

    prompts: list[TokenizedPrompt]
    completions: list[list[int]]
    ended: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    logprobs: torch.Tensor
    importance: torch.Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, prompt and completion."""
        return (self.attention_mask.sum(1) + self.mask.sum(1)).tolist()

    def rows(self, rows: list[int] | slice = slice(None)) -> tuple[torch.Tensor, ...]:
        """(input_ids, attention_mask, tokens, mask) of these rows: what log-probs are taken of."""
        return tuple(x[rows] for x in (self.input_ids, self.attention_mask, self.tokens, self.mask))


class Sampler:
    """Draws y ~ pi_theta(.|x), and takes log pi_theta(y|x).

    In float32 the policy itself draws. In 16 bits it draws with rounded weights. The log-probs are
    then taken once more, in the pass that an anchor's come from, and each sample counts by
    `reinforce.importance_weights`.

    Args:
        policy: pi_theta.
        eos_token_ids: as in rollout.generate.
        config: has seed (of all draws), temperature, max_new_tokens, micro_batch_size (rows of a
            pass where log-probs are taken again), sampler_dtype ("auto" is `dtype`), importance
            and importance_limit (kind and limit of the weights).
        dtype: of the forward passes.
        mine: this process's rows of a batch. Every process draws the whole batch's numbers.
        stop: what finds a text that ends a completion, as in rollout.sample_completions.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        eos_token_ids: list[int],
        config: SimpleNamespace,
        dtype: torch.dtype,
        mine: slice = slice(None),
        stop: rollout.Stop | None = None,
    ) -> None:
        self.policy, self.eos_token_ids, self.config = policy, eos_token_ids, config
        self.dtype, self.mine, self.stop = dtype, mine, stop
        name = config.sampler_dtype
        self.drawn_in = dtype if name == "auto" else getattr(torch, name)
        device = precision.float64_device(policy.device)
        self.generator = torch.Generator(device).manual_seed(config.seed)

    def sample(self, prompts: list[TokenizedPrompt]) -> Samples:
        """One completion for each of this process's share of the batch's prompts."""
        config, device = self.config, self.policy.device
        shape = (len(prompts), config.max_new_tokens)
        uniforms = rollout.draw_uniforms(*shape, device, self.generator)[self.mine]
        prompts = prompts[self.mine]
        asked = [prompt.ids for prompt in prompts]
        input_ids, attention_mask = pad(asked, "left", device)
        with precision.autocast(device, self.drawn_in):
            sampled = rollout.generate(
                self.policy,
                input_ids,
                attention_mask,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                eos_token_ids=self.eos_token_ids,
                pad_token_id=0,
                uniforms=uniforms,
                stop=self.stop,
            )
        (tokens, mask, logprobs), completions, ended = rollout.completions_of(
            sampled, asked, self.eos_token_ids, self.stop
        )
        batch = (input_ids, attention_mask, tokens, mask)
        sampling_logprobs = logprobs
        if {self.dtype, self.drawn_in} != {torch.float32}:
            with precision.autocast(device, self.dtype):
                logprobs = rollout.frozen_logprobs(
                    self.policy, *batch, config.temperature, config.micro_batch_size
                )
        how = (config.importance_limit, config.importance)
        importance = reinforce.importance_weights(logprobs, sampling_logprobs, mask, *how)
        if importance.ndim == 1:
            importance = importance[:, None].expand_as(logprobs)
        return Samples(prompts, completions, ended, *batch, logprobs, importance)
