"""A reward model: load, score, save. Training and scoring share one text format and one forward pass."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint import LOADING_ERRORS, first_line, model_folder
from .common import UserError
from .data import encode, pad
from .logprobs import position_ids_from_mask
from .losses import expected_score


class RewardModel:
    """A sequence classifier read as a reward.

    1 label: the logit (Bradley-Terry). 2 labels: positive minus negative logit (a sentiment classifier). K > 2 labels:
    the expected score over 1..K (ordinal). The text is prompt + completion, with the begin and end tokens of
    `data.encode`. Dropout is always off; scores are float32 whatever the model's dtype.

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

    @classmethod
    def from_pretrained(cls, path: str, device: torch.device | str = "cpu") -> "RewardModel":
        """From a run of train_rm.py, a folder or a hub id, in float32. UserError where there is no trained head."""
        try:
            folder = model_folder(path)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
        except LOADING_ERRORS as error:
            raise UserError(f"--rm {path}: cannot be loaded as a sequence classifier: {first_line(error)}") from error
        if report["missing_keys"]:  # transformers would go on with a random head
            raise UserError(
                f"--rm {path}: no trained classification head ({', '.join(sorted(report['missing_keys'])[:3])} "
                "missing): make one with train_rm.py"
            )
        return cls(model.to(device), tokenizer)

    @classmethod
    def from_backbone(cls, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_labels: int) -> "RewardModel":
        """A new reward model on a copy of a causal language model's body, with a small random head.

        Without a pad token of its own, transformers would later pool on the wrong token: where the tokenizer has none
        (or it is the end token), the unknown token becomes the pad token, or a new one is added.
        """
        config = type(backbone.config).from_dict(backbone.config.to_dict())
        config.num_labels = num_labels
        model = AutoModelForSequenceClassification.from_config(config).float()
        model.base_model.load_state_dict(backbone.base_model.state_dict())
        if not hasattr(model, "score"):
            raise UserError(f"{config.model_type}: has no reward head at its last token: expected a causal language model")
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
        if num_labels > 2:
            model.config.id2label = {k: str(k + 1) for k in range(num_labels)}
            model.config.label2id = {str(k + 1): k for k in range(num_labels)}
        return cls(model, tokenizer)

    @property
    def reading(self) -> str:
        """How the logits become a reward, in words."""
        return {1: "scalar", 2: "logit difference of 2 labels"}.get(self.num_labels, f"expected score 1..{self.num_labels}")

    def encode(self, prompt: str, completion: str) -> list[int]:
        """The one text format, as token ids: [begin] prompt + completion [end]."""
        return encode(self.tokenizer, prompt + completion, end=True)

    def encode_rollout(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], completions: Sequence[list[int]]
    ) -> list[list[int]]:
        """The same format for token ids of a policy (completions without their end token).

        Ids are used as they are where the two vocabularies agree, and go through text where they do not.
        """
        if same_ids(tokenizer, self.tokenizer):
            end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
            return [prompt + completion + end for prompt, completion in zip(prompts, completions)]
        # All but the begin token, which encode() puts back: the markers of a chat prompt are special tokens, too.
        bare = [prompt[1:] if prompt[:1] == [tokenizer.bos_token_id] else prompt for prompt in prompts]
        texts = [tokenizer.decode(prompt + completion) for prompt, completion in zip(bare, completions)]
        return [self.encode("", text) for text in texts]

    def forward(self, rows: Sequence[list[int]]) -> torch.Tensor:
        """Logits (N, K), float32, of token rows, with gradients: what training and scoring both call."""
        self.model.eval()  # dropout would make a score a random number
        ids, mask = pad(rows, "right", self.model.device)
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context and ids.shape[1] > context:
            raise UserError(
                f"got a text of {ids.shape[1]} tokens, expected at most {context}, the reward model's context: "
                "shorten the prompts or --max-new-tokens"
            )
        if not hasattr(self.model, "score"):  # an encoder with a pooling of its own
            return self.model(input_ids=ids, attention_mask=mask).logits.float()
        hidden = self.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=position_ids_from_mask(mask), use_cache=False
        ).last_hidden_state  # (N, T, D)
        # The last real token by the mask: going by token id stops early where pad == eos.
        pooled = hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
        with torch.autocast(ids.device.type, enabled=False):  # bfloat16 scores tie: .02 apart near 5
            return torch.nn.functional.linear(pooled.float(), self.model.score.weight.float())

    @torch.no_grad()
    def logits(self, rows: Sequence[list[int]], batch_size: int = 64) -> torch.Tensor:
        """Logits (N, K) of token rows without gradients, in batches of like length."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        logits = torch.cat([self.forward([rows[i] for i in batch]) for batch in batches])
        return logits[torch.tensor(order, device=logits.device).argsort()]

    def read_out(self, logits: torch.Tensor) -> torch.Tensor:
        """Rewards (N,) from logits (N, K)."""
        if self.num_labels == 1:
            return logits[:, 0]
        if self.num_labels == 2:
            names = [str(self.model.config.id2label.get(k, "")).lower() for k in range(2)]
            positive = 0 if names[0].startswith("pos") else 1
            return logits[:, positive] - logits[:, 1 - positive]
        return expected_score(logits)

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> torch.Tensor:
        """Rewards (N,) float32 of completions, texts in: prompt + completion is the whole text."""
        if len(prompts) != len(completions) or not len(prompts):
            raise ValueError(f"got {len(prompts)} prompts and {len(completions)} completions, expected as many, at least one")
        return self.read_out(self.logits([self.encode(p, c) for p, c in zip(prompts, completions)]))

    def save_pretrained(self, path: str | Path) -> None:
        """A standard checkpoint: AutoModelForSequenceClassification and AutoTokenizer load it to the same scores."""
        padding_side, self.tokenizer.padding_side = self.tokenizer.padding_side, "right"
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        self.tokenizer.padding_side = padding_side


@functools.lru_cache
def same_ids(policy_tokenizer: PreTrainedTokenizerBase, reward_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every token of the policy has the same id for the reward model, the begin token included."""
    same_begin = policy_tokenizer.bos_token_id == reward_tokenizer.bos_token_id
    return same_begin and policy_tokenizer.get_vocab().items() <= reward_tokenizer.get_vocab().items()
