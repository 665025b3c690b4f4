"""Small stand-ins for models and data sets of the hub, in the formats of the real ones."""

import json
import random
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

GOOD, BAD = "superb lovely good moving funny".split(), "awful dull bad weak dreadful".split()
NOUNS = "plot cast ending music camera script humour pacing".split()
CHATML = (  # as SmolLM2-135M-Instruct has it
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_bpe(texts: list[str], size: int, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def imdb_rows(count: int) -> list[dict]:
    """Columns text and label, 0 negative and 1 positive."""
    rng = random.Random(0)

    def sentence(label):
        one, two = (rng.choice(GOOD if (rng.random() < 0.85) == label else BAD) for _ in range(2))
        return f"The {rng.choice(NOUNS)} was {one} and the {rng.choice(NOUNS)} felt {two}."

    def review(label):
        return " ".join(sentence(label) for _ in range(rng.randint(3, 8)))

    return [{"text": review(i % 2), "label": i % 2} for i in range(count)]


def helpsteer_rows(count: int) -> list[dict]:
    """HelpSteer2_binarized: a prompt that may hold turns, two answers as messages, mean ratings.

    Each answer has the prompt as its first message. Ratings lie in 0..4.
    """
    rng = random.Random(0)
    rows = []
    for number in range(count):
        prompt = f"Tell me about the {rng.choice(NOUNS)} of film {number}"
        if rng.random() < 0.3:
            prompt = f"Hello {number}\n<extra_id_1>Assistant\nHi!\n<extra_id_1>User\n{prompt}"
        row, ratings = {"prompt": prompt}, sorted(rng.uniform(0, 4) for _ in range(2))
        for name, rating in zip(("rejected", "chosen"), ratings):
            length = rng.randint(2, 9)
            words = [rng.choice(GOOD if rng.random() < rating / 4 else BAD) for _ in range(length)]
            answer = " ".join(f"It is {word}." for word in words)
            question = {"content": prompt, "role": "user"}
            row[name] = [question, {"content": answer, "role": "assistant"}]
            row[f"{name}_rating"] = rating
        rows.append(row)
    return rows


def save(folder: Path, *parts) -> None:
    for part in parts:
        part.save_pretrained(folder)


def write_all(folder: Path) -> None:
    """Everything that the tasks of docs/tasks.md name, under the last part of its hub id."""
    torch.manual_seed(0)
    imdb, helpsteer = imdb_rows(800), helpsteer_rows(300)

    end = "<|endoftext|>"  # bos, eos and unk in one; no pad, no template
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe([row["text"] for row in imdb], 400, [end]),
        bos_token=end,
        eos_token=end,
        unk_token=end,
    )
    sizes = dict(n_positions=256, n_embd=32, n_layer=2, n_head=2)
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **sizes)
    save(folder / "gpt2-imdb", GPT2LMHeadModel(config), tokenizer)

    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    pieces.train_from_iterator([row["text"] for row in imdb], trainer)
    pieces.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=512,
    )
    sizes = dict(vocab_size=len(tokenizer), dim=32, hidden_dim=64, n_layers=2, n_heads=2)
    encoder = DistilBertForMaskedLM(DistilBertConfig(**sizes))
    save(folder / "distilbert-base-cased", encoder, tokenizer)
    config = DistilBertConfig(**sizes, num_labels=2, id2label={0: "NEGATIVE", 1: "POSITIVE"})
    save(folder / "distilbert-imdb", DistilBertForSequenceClassification(config), tokenizer)

    (folder / "imdb").mkdir(exist_ok=True)  # a folder of Parquet files, as the hub has it
    for split, rows in (("train", imdb[:600]), ("test", imdb[600:])):
        data = Dataset.from_list(rows).cast_column("label", ClassLabel(names=["neg", "pos"]))
        data.to_parquet(folder / "imdb" / f"{split}-00000-of-00001.parquet")

    texts = [row["prompt"] + row["chosen"][1]["content"] for row in helpsteer]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(texts, 500, special),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=8192,
    )
    tokenizer.chat_template = CHATML
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **ids,
    )
    llama = LlamaForCausalLM(config)
    llama.generation_config = GenerationConfig(**ids)
    save(folder / "SmolLM2-135M-Instruct", llama.to(torch.bfloat16), tokenizer)
    data = DatasetDict(average_rating_split=Dataset.from_list(helpsteer))
    data.save_to_disk(folder / "HelpSteer2_binarized")
    (folder / "helpsteer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in helpsteer))
