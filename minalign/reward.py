"""A reward model: load, score, save.

Training and scoring share one text format and one forward pass.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .data.chat import Prompt, TokenizedPrompt, answer_frame, encode, encode_whole, to_messages
from .logprobs import position_ids_from_mask
from .losses import expected_score, score_variance
from .models.folders import model_folder
from .models.loading import load_model
from .models.lora import adapter_labels, dense_state, lora_layers, save_adapter
from .models.padding import length_parts, pad, tokens_per_pass
from .running.errors import require

if typing.TYPE_CHECKING:
    from .data.pairs import Example


class Scores(NamedTuple):
    """What a reward says of B completions.

    rewards: (B,) float32.
    variance: (B,), scores squared, where the reward is an ordinal model's; elsewhere None.
    parts: where the reward is a sum, each part's own rewards (B,) by name.
    """

    rewards: torch.Tensor
    variance: torch.Tensor | None
    parts: dict[str, torch.Tensor]


class Objective(NamedTuple):
    """What a reward model is trained for, over K texts in order, the best first (a pair: K = 2).

    Logits are (K, B, labels). There are B examples, and a loss has one value for each.

    labels: outputs of the head.
    order_losses: (logits, examples) -> (B,) -log P(this order), nats.
    penalties: (logits, examples) -> (B,) or a number, what training adds to the order losses.
    floor: examples -> the mean order loss of a constant model, nats.
    win_probabilities: logits -> (B,), the probability that the first text beats the second.
    """

    labels: int
    order_losses: Callable[[torch.Tensor, Sequence[Example]], torch.Tensor]
    penalties: Callable[[torch.Tensor, Sequence[Example]], torch.Tensor | float]
    floor: Callable[[Sequence[Example]], float]
    win_probabilities: Callable[[torch.Tensor], torch.Tensor]


class RewardModel:
    """A sequence classifier read as a reward.

    1 label: the logit (Bradley-Terry).
    2 labels: the positive minus the negative logit (a sentiment classifier).
    K > 2 labels: the expected score over 1..K (ordinal).

    The text is prompt + completion, with the begin and end tokens of `data.chat.encode_whole`.
    Dropout is always off. Scores are float32 whatever the model's dtype.

    Args:
        model: a transformers sequence classifier, on its device.
        tokenizer: the model's own.

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
        context = getattr(model.config, "max_position_embeddings", None)
        self.context = context or tokenizer.model_max_length
        # An encoder. Some have positions that no token can take (RoBERTa: 514 for 512 tokens).
        if not hasattr(model, "score"):
            self.context = min(self.context, tokenizer.model_max_length)

    @classmethod
    def from_pretrained(cls, path: str, device: torch.device | str = "cpu") -> RewardModel:
        """A trained reward model, in float32.

        Args:
            path: a run of train_rm.py, a folder, or a hub id.
            device: where it goes.
        Raises:
            UserError: it cannot be loaded, or has no trained head.
        """
        labels = adapter_labels(model_folder(path))
        options = {} if labels is None else {"num_labels": labels}
        model, tokenizer, missing = load_model(
            AutoModelForSequenceClassification, path, "--rm", **options
        )
        # transformers would continue with a random head.
        require(
            not missing,
            f"--rm {path}: no trained classification head ({', '.join(sorted(missing)[:3])} "
            "missing): make one with train_rm.py",
        )
        # Adapters bring no config, and so neither the pad token nor the names of the scores.
        if labels is not None:
            return cls._with_labels(model.to(device), tokenizer, new_head=False)
        return cls(model.to(device), tokenizer)

    @classmethod
    def from_base(cls, path: str, num_labels: int) -> RewardModel:
        """A new reward model on the body of a language model, with a new head.

        The body of an earlier reward model with as many labels brings its head along.

        Args:
            path: a causal language model, or an encoder such as BERT: a folder or a hub id.
            num_labels: outputs of the head.
        Raises:
            UserError: it cannot be loaded, or weights of the body are missing.
        """
        options = {"num_labels": num_labels, "problem_type": None}
        model, tokenizer, missing = load_model(
            AutoModelForSequenceClassification, path, "--model", **options
        )
        body = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
        require(
            not body,
            f"--model {path}: weights missing: {', '.join(sorted(body)[:3])}: a broken checkpoint",
        )
        return cls._with_labels(model, tokenizer, new_head=bool(missing))

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
        return cls._with_labels(model, tokenizer, new_head=True)

    @classmethod
    def _with_labels(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_head: bool
    ) -> RewardModel:
        """Start the head small, name the scores, and see to a pad token.

        Without a pad token of its own, transformers would later pool on the wrong token. Where the
        tokenizer has none (or it is the begin or end token), the unknown token becomes the pad
        token, or a new one is added.
        """
        # An encoder's head has layers of its own, started as it was designed.
        if new_head and hasattr(model, "score"):
            std = (model.score.in_features + 1) ** -0.5  # Stiennon et al. 2020
            torch.nn.init.normal_(model.score.weight, std=std)
        taken = (None, tokenizer.eos_token_id, tokenizer.bos_token_id)
        if tokenizer.pad_token_id in taken:
            if tokenizer.unk_token_id not in taken:
                tokenizer.pad_token = tokenizer.unk_token
            else:
                tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.config.pad_token_id = tokenizer.pad_token_id
        if model.config.num_labels > 2:
            model.config.id2label = {k: str(k + 1) for k in range(model.config.num_labels)}
            model.config.label2id = {str(k + 1): k for k in range(model.config.num_labels)}
        return cls(model, tokenizer)

    @property
    def reading(self) -> str:
        """How the logits become a reward, in words."""
        words = {1: "scalar", 2: "logit difference of 2 labels"}
        return words.get(self.num_labels, f"expected score 1..{self.num_labels}")

    def encode(self, prompt: Prompt, completion: str) -> list[int]:
        """The one text format, as token ids.

        It is [begin] prompt + completion [end], or what the chat template makes of both. A prompt
        as text is one user's turn where the tokenizer has a chat template: train_rm.py takes the
        template off a reward model that it trained on plain text.
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

        Ids are used as they are where the two vocabularies (and chat templates) agree. Otherwise
        they go through text.

        Args:
            tokenizer: the policy's.
            prompts: N of them, as the policy saw them.
            completions: N lists of the policy's ids, without their end token.
        """
        ids_agree = same_ids(tokenizer, self.tokenizer)
        same_template = tokenizer.chat_template == self.tokenizer.chat_template
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        rows = []
        for prompt, completion in zip(prompts, completions):
            if ids_agree and prompt.messages is None:
                rows.append(prompt.ids + completion + end)
            elif ids_agree and same_template and tokenizer.chat_template:
                ending = answer_frame(self.tokenizer)[1]
                ending_ids = self.tokenizer(ending, add_special_tokens=False)["input_ids"]
                rows.append(prompt.ids + completion + ending_ids)
            elif prompt.messages is not None:
                answer = tokenizer.decode(completion)
                rows.append(encode_whole(self.tokenizer, prompt.messages, answer))
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
        variance = score_variance(logits) if self.num_labels > 2 else None
        return Scores(self.read_out(logits), variance, {})

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
        logits = torch.cat([self.one_pass([rows[i] for i in part]) for part in parts])
        order = torch.tensor([i for part in parts for i in part], device=logits.device)
        return logits[order.argsort()]

    def one_pass(self, rows: Sequence[list[int]]) -> torch.Tensor:
        """Logits (N, K), float32, of token rows that go through the model together."""
        self.model.eval()  # dropout would make a score a random number
        for adapter in lora_layers(self.model).values():
            adapter.training = torch.is_grad_enabled()  # but --lora-dropout acts in training
        ids, mask = pad(rows, "right", self.model.device)
        require(
            ids.shape[1] <= self.context,
            f"got a text of {ids.shape[1]} tokens, expected at most {self.context}, the reward "
            "model's context: shorten the prompts or --max-new-tokens",
        )
        # An encoder: pooling and head are its own, and stay in float32 as ours does.
        if not hasattr(self.model, "score"):
            with torch.autocast(ids.device.type, enabled=False):
                return self.model(input_ids=ids, attention_mask=mask).logits
        positions = position_ids_from_mask(mask)
        output = self.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        )
        hidden = output.last_hidden_state  # (N, T, D)
        # The last real token by the mask: going by token id stops early where pad == eos.
        pooled = hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
        # bfloat16 scores tie: near 5 they are .02 apart.
        with torch.autocast(ids.device.type, enabled=False):
            return torch.nn.functional.linear(pooled.float(), self.model.score.weight.float())

    @torch.no_grad()
    def logits(self, rows: Sequence[list[int]], batch_size: int = 64) -> torch.Tensor:
        """Logits (N, K), float32, of token rows, without gradients."""
        return self.forward(rows, batch_size)

    def read_out(self, logits: torch.Tensor) -> torch.Tensor:
        """Rewards (N,) from logits (N, K), as the class says for its number of labels."""
        if self.num_labels == 1:
            return logits[:, 0]
        if self.num_labels == 2:
            names = [str(self.model.config.id2label.get(k, "")).lower() for k in range(2)]
            positive = 0 if names[0].startswith("pos") else 1
            return logits[:, positive] - logits[:, 1 - positive]
        return expected_score(logits)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> torch.Tensor:
        """Rewards of completions, from texts.

        Args:
            prompts: N texts or lists of chat messages.
            completions: N texts.
        Returns:
            (N,) float32.
        Raises:
            ValueError: there are none, or not as many of the one as of the other.
            UserError: a text is longer than the model's context.
        """
        if len(prompts) != len(completions) or not len(prompts):
            raise ValueError(
                f"got {len(prompts)} prompts and {len(completions)} completions, expected as many, "
                "at least one"
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
        padding_side, self.tokenizer.padding_side = self.tokenizer.padding_side, "right"
        if adapter_of:
            save_adapter(self.model, path, model_folder(adapter_of))
        else:
            # as in loading.save_policy: on any rank
            self.model.should_save_on_this_rank = lambda is_main_process: True
            self.model.save_pretrained(path, state_dict=dense_state(self.model))
        self.tokenizer.save_pretrained(path)
        self.tokenizer.padding_side = padding_side


@functools.lru_cache
def same_ids(
    policy_tokenizer: PreTrainedTokenizerBase, reward_tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Whether both give every token of the policy the same id, the begin token included."""
    same_begin = policy_tokenizer.bos_token_id == reward_tokenizer.bos_token_id
    policy_vocab, reward_vocab = policy_tokenizer.get_vocab(), reward_tokenizer.get_vocab()
    return same_begin and policy_vocab.items() <= reward_vocab.items()
