"""Random models of 2 layers with a byte-level tokenizer, as other people's tools write them.

Ids 0 to 3 are <pad> <|endoftext|> <|im_start|> <|im_end|>. Nothing here is made by minalign.
"""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)


def turn(opening=""):
    return "{{ '<|im_start|>' + m.role + '\n" + opening + "' + m.content + '<|im_end|>\n' }}"


def each(body):
    return "{% for m in messages %}" + body + "{% endfor %}"


def only(test, body):
    return "{% if " + test + " %}" + body + "{% endif %}"


TURN = turn()
CUE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINK = (
    "{% if m.role == 'assistant' and loop.last %}"
    + turn("<think>\n\n</think>\n\n")
    + "{% else %}"
    + TURN
    + "{% endif %}"
)
PARTS = (
    "<|im_start|>{{ m.role }}\n{% for p in m.content if p.type == 'text' %}{{ p.text }}"
    "{% endfor %}<|im_end|>\n"
)
ALTERNATE = only(
    "(m.role == 'user') != (loop.index0 % 2 == 0)", "{{ raise_exception('roles must alternate') }}"
)
TEMPLATES = {
    "plain": None,
    "chatml": each(TURN) + CUE,
    "nocue": each(TURN),
    # other roles: nothing
    "known": each(only("m.role in ('system', 'user', 'assistant')", TURN)) + CUE,
    "think": each(THINK) + CUE,
    "parts": each(PARTS) + CUE,
    "strict": each(ALTERNATE + TURN) + CUE,
}


def tokenizer(template="plain", eos="<|im_end|>"):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        ["what is the capital of this good film ?"] * 3,
        trainers.BpeTrainer(
            vocab_size=300,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ),
    )
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token="<pad>")
    tok.chat_template = TEMPLATES.get(template, template)
    return tok


def model(tok, head="lm", seed=0, **config):
    """A language model, or with head "rm" a reward model of one label."""
    torch.manual_seed(seed)
    given = dict(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=tok.eos_token_id,
        pad_token_id=0,
        num_labels=1,
    )
    kind = AutoModelForSequenceClassification if head == "rm" else AutoModelForCausalLM
    made = kind.from_config(LlamaConfig(**given | config))
    if head == "rm":
        torch.nn.init.normal_(made.score.weight)
    return made


def likes(tok, token, seed=0):
    """A language model that draws `token` about one time in three."""
    made = model(tok, seed=seed, tie_word_embeddings=False)
    with torch.no_grad():
        made.model.embed_tokens.weight += 5
        made.lm_head.weight[token] = 5 / 32
    return made


def save(folder, made, tok):
    """A checkpoint; returns its path as text, for a command line."""
    made.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


def policy(folder, template="chatml", **config):
    """A saved language model."""
    tok = tokenizer(template)
    return save(folder, model(tok, tie_word_embeddings=True, **config), tok)


def reward_model(folder, template="chatml", **config):
    """A saved reward model."""
    tok = tokenizer(template)
    return save(folder, model(tok, "rm", **config), tok)


def rows(file, row, k=40):
    """k rows in a .jsonl file, with each {n} replaced by the row's number; returns its path."""
    with open(file, "w") as out:
        out.writelines(json.dumps(row).replace("{n}", str(n)) + "\n" for n in range(k))
    return str(file)


def U(text):
    return {"role": "user", "content": text}


def A(text):
    return {"role": "assistant", "content": text}


def S(text):
    return {"role": "system", "content": text}
