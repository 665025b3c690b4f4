"""A reward model: load, score, save. Training and scoring share one text format and one forward pass."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from .batches import length_parts, pad, tokens_a_pass
from .chat import Prompt, TokenizedPrompt, answer_frame, encode, encode_whole, to_messages
from .checkpoint import load_model
from .folders import model_folder
from .common import require
from .logprobs import position_ids_from_mask
from .lora import adapter_labels, dense_state, lora_layers, save_adapter
from .losses import expected_score, score_variance


class Scores(NamedTuple):
    """What a reward says of B completions: rewards (B,); variance (B,) or None; the parts of a sum, by name, as they were."""

    rewards: torch.Tensor
    variance: torch.Tensor | None
    parts: dict[str, torch.Tensor]


class RewardModel:
    """A sequence classifier read as a reward.

    1 label: the logit (Bradley-Terry). 2 labels: positive minus negative logit (a sentiment classifier). K > 2 labels:
    the expected score over 1..K (ordinal). The text is prompt + completion, with the begin and end tokens of
    `chat.encode_whole`. Dropout is always off; scores are float32 whatever the model's dtype.

    >>> from minalign import toy
    >>> tokenizer = toy.make_tokenizer()
    >>> reward_model = RewardModel.from_backbone(toy.make_model(tokenizer, seed=0), tokenizer, num_labels=10)
    >>> reward_model.score(["overall , the plot is"], [" very good ."]).shape
    torch.Size([1])
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self.tokenizer = tokenizer
        self.num_labels = model.config.num_labels
        self.context = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        if not hasattr(model, "score"):  # an encoder; some have positions that no token can take (RoBERTa: 514 for 512)
            self.context = min(self.context, tokenizer.model_max_length)

    @classmethod
    def from_pretrained(cls, path: str, device: torch.device | str = "cpu") -> "RewardModel":
        """From a run of train_rm.py, a folder or a hub id, in float32. UserError where there is no trained head."""
        labels = adapter_labels(model_folder(path))
        options = {} if labels is None else {"num_labels": labels}
        model, tokenizer, missing = load_model(AutoModelForSequenceClassification, path, "--rm", **options)
        require(  # transformers would go on with a random head
            not missing,
            f"--rm {path}: no trained classification head ({', '.join(sorted(missing)[:3])} missing): make one with train_rm.py",
        )
        if labels is not None:  # adapters bring no config: the pad token and the names of the scores
            return cls._with_labels(model.to(device), tokenizer, new_head=False)
        return cls(model.to(device), tokenizer)

    @classmethod
    def from_base(cls, path: str, num_labels: int) -> "RewardModel":
        """A new reward model on the body of a language model (causal, or an encoder such as BERT), with a new head.

        The body of an earlier reward model with as many labels brings its head along. UserError where it cannot be loaded.
        """
        options = {"num_labels": num_labels, "problem_type": None}
        model, tokenizer, missing = load_model(AutoModelForSequenceClassification, path, "--model", **options)
        body = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
        require(not body, f"--model {path}: weights missing: {', '.join(sorted(body)[:3])}: a broken checkpoint")
        return cls._with_labels(model, tokenizer, new_head=bool(missing))

    @classmethod
    def from_backbone(cls, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_labels: int) -> "RewardModel":
        """A new reward model on a copy of a causal language model's body, with a small random head."""
        config = type(backbone.config).from_dict(backbone.config.to_dict())
        config.num_labels = num_labels
        model = AutoModelForSequenceClassification.from_config(config).float()
        model.base_model.load_state_dict(backbone.base_model.state_dict())
        return cls._with_labels(model, tokenizer, new_head=True)

    @classmethod
    def _with_labels(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_head: bool) -> "RewardModel":
        """Start the head small, name the scores, and see to a pad token.

        Without a pad token of its own, transformers would later pool on the wrong token: where the tokenizer has none
        (or it is the end token), the unknown token becomes the pad token, or a new one is added.
        """
        if new_head and hasattr(model, "score"):  # an encoder's head has layers of its own, started as it was designed
            torch.nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)  # Stiennon et al. 2020
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
        return {1: "scalar", 2: "logit difference of 2 labels"}.get(self.num_labels, f"expected score 1..{self.num_labels}")

    def encode(self, prompt: Prompt, completion: str) -> list[int]:
        """The one text format, as token ids: [begin] prompt + completion [end], or what the chat template makes of both.

        A prompt as text is one user's turn where the tokenizer has a chat template: train_rm.py takes the template off
        a reward model that it trained on plain text.
        """
        if prompt and self.tokenizer.chat_template:
            prompt = to_messages(prompt)
        return encode_whole(self.tokenizer, prompt, completion)

    def encode_rollout(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[TokenizedPrompt], completions: Sequence[list[int]]
    ) -> list[list[int]]:
        """The same format for token ids of a policy (completions without their end token).

        Ids are used as they are where the two vocabularies (and chat templates) agree, and go through text where not.
        """
        ids_agree = same_ids(tokenizer, self.tokenizer)
        same_template = tokenizer.chat_template == self.tokenizer.chat_template
        rows = []
        for prompt, completion in zip(prompts, completions):
            if ids_agree and prompt.messages is None:
                rows.append(prompt.ids + completion + [self.tokenizer.eos_token_id] * (self.tokenizer.eos_token_id is not None))
            elif ids_agree and same_template and tokenizer.chat_template:
                ending = self.tokenizer(answer_frame(self.tokenizer)[1], add_special_tokens=False)["input_ids"]
                rows.append(prompt.ids + completion + ending)
            elif prompt.messages is not None:
                rows.append(encode_whole(self.tokenizer, prompt.messages, tokenizer.decode(completion)))
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
        """Rewards of a policy's completions, and of an ordinal model the variance of each score."""
        logits = self.logits(self.encode_rollout(tokenizer, prompts, completions), batch_size)  # (B, K)
        return Scores(self.read_out(logits), score_variance(logits) if self.num_labels > 2 else None, {})

    def forward(self, rows: Sequence[list[int]], batch_size: int | None = None) -> torch.Tensor:
        """Logits (N, K), float32, of token rows, with gradients: what training and scoring both call.

        Rows of like length go through the model together, at most `batch_size` at a time.
        """
        parts = length_parts([len(row) for row in rows], batch_size or len(rows), tokens_a_pass(self.model))
        logits = torch.cat([self.one_pass([rows[i] for i in part]) for part in parts])
        return logits[torch.tensor([i for part in parts for i in part], device=logits.device).argsort()]

    def one_pass(self, rows: Sequence[list[int]]) -> torch.Tensor:
        """Logits (N, K), float32, of token rows that go through the model together."""
        self.model.eval()  # dropout would make a score a random number
        for adapter in lora_layers(self.model).values():
            adapter.training = torch.is_grad_enabled()  # but --lora-dropout acts in training
        ids, mask = pad(rows, "right", self.model.device)
        require(
            ids.shape[1] <= self.context,
            f"got a text of {ids.shape[1]} tokens, expected at most {self.context}, the reward model's context: "
            "shorten the prompts or --max-new-tokens",
        )
        if not hasattr(self.model, "score"):  # an encoder: pooling and head are its own, and stay in float32 as ours does
            with torch.autocast(ids.device.type, enabled=False):
                return self.model(input_ids=ids, attention_mask=mask).logits
        hidden = self.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=position_ids_from_mask(mask), use_cache=False
        ).last_hidden_state  # (N, T, D)
        # The last real token by the mask: going by token id stops early where pad == eos.
        pooled = hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
        with torch.autocast(ids.device.type, enabled=False):  # bfloat16 scores tie: .02 apart near 5
            return torch.nn.functional.linear(pooled.float(), self.model.score.weight.float())

    @torch.no_grad()
    def logits(self, rows: Sequence[list[int]], batch_size: int = 64) -> torch.Tensor:
        """Logits (N, K) of token rows without gradients."""
        return self.forward(rows, batch_size)

    def read_out(self, logits: torch.Tensor) -> torch.Tensor:
        """Rewards (N,) from logits (N, K)."""
        if self.num_labels == 1:
            return logits[:, 0]
        if self.num_labels == 2:
            names = [str(self.model.config.id2label.get(k, "")).lower() for k in range(2)]
            positive = 0 if names[0].startswith("pos") else 1
            return logits[:, positive] - logits[:, 1 - positive]
        return expected_score(logits)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> torch.Tensor:
        """Rewards (N,) float32 of completions, texts in; a prompt may be a list of chat messages, too."""
        if len(prompts) != len(completions) or not len(prompts):
            raise ValueError(f"got {len(prompts)} prompts and {len(completions)} completions, expected as many, at least one")
        return self.read_out(self.logits([self.encode(p, c) for p, c in zip(prompts, completions)]))

    def save_pretrained(self, path: str | Path, adapter_of: str = "") -> None:
        """A standard checkpoint: AutoModelForSequenceClassification and AutoTokenizer load it to the same scores.

        Adapters are added to the weights; with `adapter_of`, the name of their base model, they and the head are saved
        alone, in PEFT's files.
        """
        padding_side, self.tokenizer.padding_side = self.tokenizer.padding_side, "right"
        if adapter_of:
            save_adapter(self.model, path, model_folder(adapter_of))
        else:
            self.model.save_pretrained(path, state_dict=dense_state(self.model))
        self.tokenizer.save_pretrained(path)
        self.tokenizer.padding_side = padding_side


@functools.lru_cache
def same_ids(policy_tokenizer: PreTrainedTokenizerBase, reward_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every token of the policy has the same id for the reward model, the begin token included."""
    same_begin = policy_tokenizer.bos_token_id == reward_tokenizer.bos_token_id
    return same_begin and policy_tokenizer.get_vocab().items() <= reward_tokenizer.get_vocab().items()
