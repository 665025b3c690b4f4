"""A reward model: load, score, save.

Training and scoring share one text format and one forward pass.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .data.chat import TokenizedPrompt, encode, encode_sampled, encode_whole
from .data.messages import Prompt, to_messages
from .losses import expected_score, risk_adjusted_score, score_variance
from .models.broken import loading_errors
from .models.folders import model_folder
from .models.heads import (
    has_linear_score,
    in_float32,
    label_order,
    load_body,
    load_classifier,
    longest_text,
    set_up_labels_,
    try_out,
)
from .models.lora import lora_layers
from .models.padding import length_parts, pad, tokens_per_pass
from .models.saving import save_files
from .models.scoring import last_hidden_states
from .running.errors import require


class Scores(NamedTuple):
    """What a reward says of B completions.

    rewards: (B,) float32.
    variance: (B,), scores squared, where the reward is an ordinal model's; elsewhere None.
    parts: where it is made of several, the rewards (B,) of each by name, NaN where one does not
        apply; where it is adjusted to a risk, the plain "mean" score.
    applies: (B,) bool, which completions the reward says anything of; None where it is all. The
        others' rewards are 0 and mean nothing.
    """

    rewards: torch.Tensor
    variance: torch.Tensor | None
    parts: dict[str, torch.Tensor]
    applies: torch.Tensor | None = None


class RewardModel:
    """A sequence classifier read as a reward.

    1 label: the logit (Bradley-Terry).
    2 labels: the positive minus the negative logit (a sentiment classifier).
    K > 2 labels: the expected score over 1..K (ordinal).

    Which label is better is what their names say, see `models.heads.label_order`.

    The text is prompt + completion, with the begin and end tokens of `data.chat.encode_whole`.
    Dropout is always off. Scores are float32 whatever the model's dtype.

    Args:
        model: a transformers sequence classifier, on its device.
        tokenizer: the model's own.

    Its `risk` makes the ordinal reward a pessimistic one, see losses.risk_adjusted_score.

    >>> from minalign.data import toy
    >>> tokenizer = toy.make_tokenizer()
    >>> backbone = toy.make_model(tokenizer, seed=0)
    >>> reward_model = RewardModel.from_backbone(backbone, tokenizer, num_labels=10)
    >>> reward_model.score(["overall , the plot is"], [" very good ."]).shape
    torch.Size([1])
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.num_labels = model.config.num_labels
        self.order = label_order(model.config)
        self.plain_head = has_linear_score(model)
        self.context = longest_text(model, tokenizer)
        config = model.config.get_text_config()
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
        # Some heads find the end of a text by this id, so it must be what fills up.
        self.pad_token_id = max(0, config.pad_token_id or 0)
        self.padding_side, self.together = "right", True  # unless `try_out` finds otherwise
        self.risk = math.inf  # the mean of the scores

    @classmethod
    def from_pretrained(cls, path: str, device: torch.device | str = "cpu") -> RewardModel:
        """A trained reward model, in float32.

        Args:
            path: a run of train_rm.py, a folder, or a hub id.
            device: where it goes.
        Raises:
            UserError: it cannot be loaded, or has no trained head.
        """
        with loading_errors(f"--rm {path}", model_folder(path), "its first pass"):
            model, tokenizer = load_classifier(path)
            reward_model = cls(model.to(device), tokenizer)
            try_out(reward_model)
        return reward_model

    @classmethod
    def from_base(cls, path: str, num_labels: int) -> RewardModel:
        """A new reward model on the body of a language model, with a new head.

        The body of an earlier reward model with as many labels brings its head along.

        Args:
            path: a causal language model, or an encoder such as BERT: a folder or a hub id.
            num_labels: outputs of the head.
        Raises:
            UserError: it cannot be loaded, or weights of the body are missing or left over.
        """
        with loading_errors(f"--model {path}", model_folder(path), "its first pass"):
            reward_model = cls(*load_body(path, num_labels))
            try_out(reward_model)
        return reward_model

    @classmethod
    def from_backbone(
        cls, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_labels: int
    ) -> RewardModel:
        """A new reward model on a copy of a causal language model's body, with a small random head.

        Args:
            backbone: the language model, which stays as it is.
            tokenizer: the language model's own.
            num_labels: outputs of the head.
        """
        config = type(backbone.config).from_dict(backbone.config.to_dict())
        config.num_labels = num_labels
        model = AutoModelForSequenceClassification.from_config(config).float()
        model.base_model.load_state_dict(backbone.base_model.state_dict())
        set_up_labels_(model, tokenizer, new_head=True)
        return cls(model, tokenizer)

    def of(self, model: torch.nn.Module) -> RewardModel:
        """The same way of reading with another module in the model's place, as a wrapped one."""
        other = copy.copy(self)
        other.model = model
        return other

    @property
    def reading(self) -> str:
        """How the logits become a reward, in words."""
        names = [str(self.model.config.id2label.get(k, k)) for k in self.order]
        if self.num_labels == 1:
            return "scalar"
        if self.num_labels == 2:
            return f"logit difference of 2 labels, {names[1]} - {names[0]}"
        what = "expected" if self.risk == math.inf else f"risk-adjusted (tau {self.risk:g})"
        return f"{what} score 1..{self.num_labels}, from label {names[0]} to {names[-1]}"

    def encode(self, prompt: Prompt, completion: str) -> list[int]:
        """The one text format, as token ids.

        It is [begin] prompt + completion [end], or what the chat template makes of both, see
        `data.chat.encode_whole`. A prompt as text is one user's turn where the tokenizer has a chat
        template: train_rm.py takes the template off a reward model that it trained on plain text.

        Raises:
            UserError: the chat template fails, or refuses or leaves out a turn.
        """
        if prompt and self.tokenizer.chat_template:
            prompt = to_messages(prompt)
        return encode_whole(self.tokenizer, prompt, completion)

    def encode_rollout(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[TokenizedPrompt],
        completions: Sequence[list[int]],
    ) -> list[list[int]]:
        """The same format for token ids of a policy.

        Ids are used as they are where the two vocabularies (and chat templates) agree, and the
        template writes a whole dialogue as prompt and answer. Otherwise they go through text.

        Args:
            tokenizer: the policy's.
            prompts: N of them, as the policy saw them.
            completions: N lists of the policy's ids, without their end token.
        """
        ids_agree, known = same_ids(tokenizer, self.tokenizer), token_ids(tokenizer)
        same_prompts = all(
            getattr(tokenizer, name) == getattr(self.tokenizer, name)
            for name in ("chat_template", "bos_token", "eos_token")
        )
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        rows = []
        for prompt, completion in zip(prompts, completions):
            # Embeddings may have more rows than there are tokens: such ids mean nothing elsewhere.
            as_ids = ids_agree and known.issuperset(completion)
            if prompt.messages is not None:
                answer = tokenizer.decode(completion)
                ids = prompt.ids + completion if as_ids and same_prompts else None
                rows.append(encode_sampled(self.tokenizer, prompt.messages, answer, ids))
            elif as_ids:
                rows.append(prompt.ids + completion + end)
            else:  # all but the begin token, which encode() puts back
                bare = prompt.ids[1:] if prompt.ids[:1] == [tokenizer.bos_token_id] else prompt.ids
                rows.append(encode(self.tokenizer, tokenizer.decode(bare + completion), end=True))
        return rows

    def score_rollout(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[TokenizedPrompt],
        completions: Sequence[list[int]],
        batch_size: int,
    ) -> Scores:
        """Rewards of a policy's completions, and of an ordinal model the variance of each score.

        Args:
            tokenizer, prompts, completions: as in `encode_rollout`.
            batch_size: rows per pass, at most.
        """
        rows = self.encode_rollout(tokenizer, prompts, completions)
        logits = self.logits(rows, batch_size)  # (B, K)
        variance = score_variance(logits[:, self.order]) if self.num_labels > 2 else None
        adjusted = self.num_labels > 2 and self.risk < math.inf
        parts = {"mean": expected_score(logits[:, self.order])} if adjusted else {}
        return Scores(self.read_out(logits), variance, parts)

    def forward(self, rows: Sequence[list[int]], batch_size: int | None = None) -> torch.Tensor:
        """Logits of token rows, with gradients: what training and scoring both call.

        Rows of like length go through the model together.

        Args:
            rows: N lists of token ids, as `encode` makes them.
            batch_size: rows per pass, at most; None sets no limit.
        Returns:
            (N, K) float32.
        Raises:
            UserError: a row is longer than the model's context.
        """
        lengths = [len(row) for row in rows]
        parts = length_parts(lengths, batch_size or len(rows), tokens_per_pass(self.model))
        if self.model.config.is_encoder_decoder:  # pooled at end tokens: as many in all rows
            end = self.model.config.eos_token_id
            if len({row.count(end) for row in rows}) > 1:
                parts = [[i] for i in range(len(rows))]
        logits = torch.cat([self.one_pass([rows[i] for i in part]) for part in parts])
        order = torch.tensor([i for part in parts for i in part], device=logits.device)
        return logits[order.argsort()]

    def one_pass(self, rows: Sequence[list[int]]) -> torch.Tensor:
        """Logits (N, K), float32, of token rows that go through the model together."""
        if not self.together and len(rows) > 1:
            return torch.cat([self.one_pass([row]) for row in rows])
        self.model.eval()  # dropout would make a score a random number
        for adapter in lora_layers(self.model).values():
            adapter.training = torch.is_grad_enabled()  # but --lora-dropout acts in training
        ids, mask = pad(rows, self.padding_side, self.model.device)
        ids = ids.masked_fill(mask == 0, self.pad_token_id)
        require(
            ids.shape[1] <= self.context,
            f"got a text of {ids.shape[1]} tokens, expected at most {self.context}, the reward "
            "model's context: shorten the prompts or --max-new-tokens",
        )
        if not self.plain_head:
            return self.model(input_ids=ids, attention_mask=mask).logits.float()
        hidden = last_hidden_states(self.model, ids, mask)  # (N, T, D)
        # The last real token by the mask: going by token id stops early where pad == eos.
        pooled = hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
        head = self.model.score
        return in_float32(torch.nn.functional.linear, pooled, head.weight, head.bias)

    @torch.no_grad()
    def logits(self, rows: Sequence[list[int]], batch_size: int = 64) -> torch.Tensor:
        """Logits (N, K), float32, of token rows, without gradients."""
        return self.forward(rows, batch_size)

    def read_out(self, logits: torch.Tensor) -> torch.Tensor:
        """Rewards (N,) from logits (N, K), as the class says for its number of labels."""
        if self.num_labels == 1:
            return logits[:, 0]
        logits = logits[:, self.order]
        if self.num_labels == 2:
            return logits[:, 1] - logits[:, 0]
        return risk_adjusted_score(logits, self.risk)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> torch.Tensor:
        """Rewards of completions, from texts.

        Args:
            prompts: N texts or lists of chat messages.
            completions: N texts.
        Returns:
            (N,) float32.
        Raises:
            ValueError: they are no lists, there are none, or not as many of both.
            UserError: a text is longer than the model's context.
        """
        one_text = isinstance(prompts, str) or isinstance(completions, str)
        if one_text or len(prompts) != len(completions) or not len(prompts):
            raise ValueError(
                f"got {len(prompts)} prompts and {len(completions)} completions, expected two "
                "lists of as many, at least one"
            )
        return self.read_out(self.logits([self.encode(p, c) for p, c in zip(prompts, completions)]))

    def save_pretrained(self, path: str | Path, adapter_of: str = "") -> None:
        """A standard checkpoint, which AutoModelForSequenceClassification and AutoTokenizer load.

        The loaded model has the same scores. Adapters are added to the weights.

        Args:
            path: the folder.
            adapter_of: the name of the adapters' base model. With it, the adapters and the head
                are saved alone, in PEFT's files.
        """
        padding_side, self.tokenizer.padding_side = self.tokenizer.padding_side, self.padding_side
        save_files(self.model, self.tokenizer, Path(path), adapter_of)
        self.tokenizer.padding_side = padding_side


@functools.lru_cache
def same_ids(
    policy_tokenizer: PreTrainedTokenizerBase, reward_tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Whether both give every token of the policy the same id, the begin token included."""
    same_begin = policy_tokenizer.bos_token_id == reward_tokenizer.bos_token_id
    policy_vocab, reward_vocab = policy_tokenizer.get_vocab(), reward_tokenizer.get_vocab()
    return same_begin and policy_vocab.items() <= reward_vocab.items()


@functools.lru_cache
def token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that are tokens."""
    return frozenset(tokenizer.get_vocab().values())
