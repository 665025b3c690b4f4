"""Folders are atomic, and models come back in float32 with all their end tokens."""

import os
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification

from minalign.data import toy
from minalign.models.folders import model_folder
from minalign.models.loading import end_token_ids, load_policy
from minalign.running.checkpoints import resume_, save_checkpoint
from minalign.running.errors import UserError
from minalign.running.ranks import Ranks

CPU = torch.device("cpu")


def save_policy(folder, model=None, **special_tokens):
    """A toy policy with changed special tokens; returns its path."""
    tokenizer = toy.make_tokenizer()
    model = model or toy.make_model(tokenizer, seed=0)
    for name, token in special_tokens.items():
        setattr(tokenizer, name, token)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_bfloat16_checkpoint_loads_in_float32(tmp_path):
    """In bfloat16 most updates of 1e-6 round to nothing."""
    saved = toy.make_model(toy.make_tokenizer(), seed=0).bfloat16()
    model, _ = load_policy(save_policy(tmp_path, saved))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.norm.weight, saved.model.norm.weight.float())
    embedding, saved_embedding = (m.get_input_embeddings().weight for m in (model, saved))
    assert torch.equal(embedding, saved_embedding.float())


def test_a_policy_comes_with_dropout_off_and_its_tokenizer(tmp_path):
    sizes = dict(n_positions=8, n_embd=8, n_layer=1, n_head=1)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(toy.VOCABULARY), **sizes))
    model, tokenizer = load_policy(save_policy(tmp_path, gpt2.train()))
    assert not any(module.training for module in model.modules())
    assert tokenizer.get_vocab() == toy.make_tokenizer().get_vocab()
    assert tokenizer.pad_token == "<pad>"


def test_a_missing_pad_token_becomes_the_end_token(tmp_path):
    _, tokenizer = load_policy(save_policy(tmp_path, pad_token=None))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_a_tokenizer_without_end_token_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"--model {tmp_path}: the tokenizer has no end token"):
        load_policy(save_policy(tmp_path, eos_token=None))


def test_what_is_no_policy_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    config = toy.make_model(toy.make_tokenizer(), seed=0).config
    config.tie_word_embeddings = False  # else the embedding would do as a head
    classifier = save_policy(tmp_path / "classifier", LlamaForSequenceClassification(config))
    empty = str(tmp_path / "empty")
    for path, message in (
        (empty, "cannot be loaded"),
        (classifier, "weights missing: lm_head.weight"),
    ):
        with pytest.raises(UserError, match=f"--model {path}: {message}") as error:
            load_policy(path)
        assert "\n" not in str(error.value)


def test_a_truncated_checkpoint_is_one_line(tmp_path):
    path = save_policy(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_policy(path)


def test_a_run_stands_for_the_model_in_it(tmp_path):
    save_policy(tmp_path / "run" / "model")
    assert model_folder(str(tmp_path / "run")) == str(tmp_path / "run" / "model")
    assert model_folder(str(tmp_path / "run" / "model")) == str(tmp_path / "run" / "model")
    assert model_folder("owner/name") == "owner/name"
    model, _ = load_policy(str(tmp_path / "run"))
    inner, _ = load_policy(str(tmp_path / "run" / "model"))
    assert torch.equal(model.model.norm.weight, inner.model.norm.weight)


@pytest.mark.parametrize(
    "named, expected", [([7, 5], [2, 5, 7]), (7, [2, 7]), (2, [2]), ([2], [2]), (None, [2])]
)
def test_end_tokens_are_the_tokenizers_and_all_of_the_generation_config(named, expected, tmp_path):
    saved = toy.make_model(toy.make_tokenizer(), seed=0)
    saved.generation_config.eos_token_id = named
    assert end_token_ids(saved, toy.make_tokenizer()) == expected
    assert end_token_ids(*load_policy(save_policy(tmp_path, saved))) == expected


def test_a_model_without_generation_config_ends_as_its_tokenizer_says():
    model = toy.make_model(toy.make_tokenizer(), seed=0)
    model.generation_config = None
    assert end_token_ids(model, toy.make_tokenizer()) == [2]


def test_logs_are_on_the_disk_before_the_checkpoint(tmp_path, monkeypatch):
    """A checkpoint that a power cut leaves without its lines would leave a gap in the log."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    real, synced = os.fsync, []

    def record(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    save_checkpoint(tmp_path, 1, {"weights": [torch.ones(2)]}, keep=1)
    assert synced[0] == "metrics.jsonl" and "state.pt" in synced
    weights = [torch.zeros(2)]
    assert resume_(tmp_path, {"weights": weights}, Ranks(), CPU) == 1 and weights[0].tolist() == [
        1.0,
        1.0,
    ]
