"""What a model's files say is looked up at load, or the load ends in one line that names them."""

import json
import random
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import train_rm
from minalign.models.loading import load_policy
from minalign.models.lora import adapter_parameters, add_lora_, lora_layers, merge_lora_
from minalign.reward import RewardModel
from minalign.running.errors import UserError

TOKENIZER = tiny.tokenizer("plain")
V = len(TOKENIZER)
PROMPTS, ANSWERS = ["what", "what is the capital of this"], [" good", " good film is a good film ?"]
BERT = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
BERT |= dict(intermediate_size=64, max_position_embeddings=64, initializer_range=0.3)
BART = dict(vocab_size=V, d_model=32, encoder_layers=2, decoder_layers=2, pad_token_id=V - 1)
BART |= dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64)
BART |= dict(decoder_ffn_dim=64, max_position_embeddings=64, init_std=0.3, eos_token_id=3)
LLAMA = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
LLAMA |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
T5 = dict(vocab_size=V, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
T5 |= dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=3, initializer_factor=3.0)
DISTIL = dict(vocab_size=V, dim=32, hidden_dim=64, n_layers=2, n_heads=4)
DISTIL |= dict(max_position_embeddings=64, initializer_range=0.3)


def saved(folder, kind, config, **changes):
    """A checkpoint of a transformers class with random weights; returns its path."""
    torch.manual_seed(0)
    return tiny.save(folder, kind(config(**changes)), TOKENIZER)


def from_base(path):
    return RewardModel.from_base(path, num_labels=1)


def rm_of(path):
    return RewardModel.from_pretrained(path)


def refused(load, path):
    """The one line that a load ends in."""
    with pytest.raises(UserError) as error:
        load(str(path))
    line = str(error.value)
    shown = str(path)[:99] if str(path).isprintable() else ""
    assert "\n" not in line and shown in line and line.startswith(("--rm ", "--model "))
    return line


def edit(file, **changes):
    """Change keys of a JSON file; None removes one."""
    old = json.loads(Path(file).read_text()) if Path(file).exists() else {}
    new = {key: value for key, value in (old | changes).items() if value is not None}
    Path(file).write_text(json.dumps(new))


def with_tensors(folder, **tensors):
    """Add tensors to a checkpoint (a double underscore stands for a dot); None removes one."""
    file = Path(folder) / "model.safetensors"
    state = load_file(file) | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({name: t for name, t in state.items() if t is not None}, file, {"format": "pt"})


def bare_logits(path, rows):
    """By transformers: each row alone, without padding, mask or positions."""
    model = hf.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])


def assert_as_alone(path):
    """A reward model's logits in a batch are those of transformers for each text alone."""
    rm = rm_of(path)
    rows = [rm.encode(*text) for text in zip(PROMPTS, ANSWERS)]
    want = bare_logits(path, rows)
    assert (want[0] - want[1]).abs().max() > 1e-2, "the case must tell the texts apart"
    torch.testing.assert_close(rm.logits(rows), want, atol=1e-4, rtol=1e-4)
    return rm


# --- which head


def token_classifier(folder):
    return saved(folder, hf.LlamaForTokenClassification, hf.LlamaConfig, num_labels=2, **LLAMA)


def multiple_choice(folder):
    path = saved(folder, hf.BertForMultipleChoice, hf.BertConfig, **BERT)
    edit(Path(path) / "config.json", id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    return path


def tied_reward_model(folder):
    return tiny.reward_model(folder, "plain", tie_word_embeddings=True)


def unnamed_tied_reward_model(folder):
    path = tied_reward_model(folder)
    edit(Path(path) / "config.json", architectures=None)
    return path


def head_with_bias(folder):
    path = tiny.reward_model(folder, "plain")
    with_tensors(path, score__bias=torch.ones(1))
    return path


def third_layer_left_over(folder):
    path = tiny.reward_model(folder, "plain", num_hidden_layers=3, tie_word_embeddings=True)
    edit(Path(path) / "config.json", num_hidden_layers=2, layer_types=None)
    return path


def third_layer_of_a_policy(folder):
    path = tiny.policy(folder, "plain", num_hidden_layers=3)
    edit(Path(path) / "config.json", num_hidden_layers=2, layer_types=None)
    return path


def value_head(folder):
    path = tiny.policy(folder, "plain")
    with_tensors(path, v_head__summary__weight=torch.ones(1, 32))
    return path


@pytest.mark.parametrize(
    "make, load, word",
    [
        pytest.param(token_classifier, rm_of, "TokenClassification", id="A-F15-token-classifier"),
        pytest.param(token_classifier, from_base, "TokenClassification", id="A-F15-to-train-on"),
        pytest.param(multiple_choice, rm_of, "MultipleChoice", id="A-F15-multiple-choice"),
        pytest.param(head_with_bias, rm_of, "score.bias", id="A-F15-bias-of-the-head"),
        pytest.param(third_layer_left_over, rm_of, "layers.2", id="A-F15-layer-left-over"),
        pytest.param(third_layer_left_over, from_base, "layers.2", id="A-F15-layer-to-train-on"),
        pytest.param(third_layer_of_a_policy, load_policy, "layers.2", id="A-F15-layer-of-policy"),
        pytest.param(tied_reward_model, load_policy, "score.weight", id="B14-tied-reward-model"),
        pytest.param(unnamed_tied_reward_model, load_policy, "score.weight", id="B14-unnamed"),
        pytest.param(value_head, rm_of, "v_head", id="A-H1-value-head"),
    ],
)
def test_another_head_than_the_one_asked_for_is_refused_by_name(make, load, word, tmp_path):
    assert word in refused(load, make(tmp_path / "m"))


@pytest.mark.parametrize("make, load", [(tied_reward_model, rm_of), (tiny.policy, load_policy)])
def test_buffers_and_copies_that_nothing_takes_are_no_reason_to_refuse(make, load, tmp_path):
    """Kept from A-F15: what older checkpoints hold beside their weights."""
    path = make(tmp_path / "m")
    embedding = load_file(Path(path) / "model.safetensors")["model.embed_tokens.weight"]
    with_tensors(
        path,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
        model__layers__0__attn__masked_bias=torch.ones(()),
        model__embeddings__position_ids=torch.arange(9),
        lm_head__weight=embedding.clone(),
    )
    load(path)


def test_a_policy_with_a_value_head_loads_and_says_that_it_is_not_used(tmp_path, capsys):
    """Kept from A-F15: what TRL's PPO saves."""
    load_policy(value_head(tmp_path / "m"))
    assert "not used: v_head.summary.weight" in capsys.readouterr().out


@pytest.mark.parametrize("labels", [1, 4])
def test_the_number_of_labels_is_that_of_the_head(labels, tmp_path):
    """A-H1: OpenRLHF's reward models have score.weight [1, H] and no num_labels."""
    path = tiny.reward_model(tmp_path / "m", "plain", num_labels=labels)
    edit(Path(path) / "config.json", id2label=None, label2id=None, architectures=["RewardModel"])
    assert rm_of(path).num_labels == labels


@pytest.mark.parametrize(
    "change, load, words",
    [
        pytest.param({"num_labels": 10}, from_base, "score.weight is [10, 32]", id="A-H1-labels"),
        pytest.param({"vocab_size": 300}, rm_of, "embed_tokens.weight is [300, 32]", id="A-H1-rm"),
    ],
)
def test_weights_of_another_shape_are_named_with_both_shapes(change, load, words, tmp_path):
    path = tiny.reward_model(tmp_path / "m", "plain", **change)
    edit(Path(path) / "config.json", vocab_size=V)
    assert words in refused(load, path) and "report" not in refused(load, path)


# --- what labels mean


NAMES = {
    "A-F14-positive-first": (["positive", "neutral", "negative"], [2, 1, 0]),
    "A-F14-mixed": (["Neutral", "NEGATIVE", "Positive"], [1, 0, 2]),
    "A-F14-stars": (["1 star", "2 stars", "3 stars"], [0, 1, 2]),
    "A-F14-stars-falling": (["3 stars", "2 stars", "1 star"], [2, 1, 0]),
    "A-F14-signed": (["1", "-1", "0"], [1, 2, 0]),
    "A-F14-dashes-are-no-signs": (["score-1", "score-2", "score-3"], [0, 1, 2]),
    "A-F14-five": (
        ["Very Negative", "Negative", "Neutral", "Positive", "Very Positive"],
        [0, 1, 2, 3, 4],
    ),
    "A-F14-unnamed": (["LABEL_0", "LABEL_1", "LABEL_2"], [0, 1, 2]),
    "A-F14-two-numbers-falling": (["1", "0"], [1, 0]),
    "A-F14-one-of-two": (["positive", "other"], [1, 0]),
    "A-F14-two-others": (["ham", "spam"], [0, 1]),
    "A-F14-good-first": (["Good", "Bad"], [1, 0]),
    "A-F14-chosen-first": (["CHOSEN", "rejected"], [1, 0]),
}


def classifier(names, **changes):
    id2label = dict(enumerate(names))
    config = dict(id2label=id2label, label2id={name: k for k, name in id2label.items()})
    model = tiny.model(TOKENIZER, "rm", num_labels=len(names), **config | changes)
    return RewardModel(model, TOKENIZER)


@pytest.mark.parametrize("names, order", NAMES.values(), ids=NAMES)
def test_a_reward_rises_with_what_the_labels_are_called(names, order):
    rm = classifier(names)
    logits = torch.full((len(names), len(names)), -9.0).fill_diagonal_(9.0)
    rewards = rm.read_out(logits)  # row k is sure of label k
    assert rewards.argsort().tolist() == order
    if len(names) == 2:
        assert f"{names[order[1]]} - {names[order[0]]}" in rm.reading
    else:
        assert f"from label {names[order[0]]} to {names[order[-1]]}" in rm.reading
        want = (logits.softmax(1) * torch.tensor(order).argsort().add(1)).sum(1)
        torch.testing.assert_close(rewards, want)


@pytest.mark.parametrize(
    "names, problem_type",
    [
        pytest.param(["LABEL_0", "LABEL_1"], "regression", id="A-F14-regression-of-two"),
        pytest.param(["1", "2", "3"], "multi_label_classification", id="A-F14-multi-label"),
        pytest.param(["helpfulness", "verbosity", "safety"], None, id="A-F14-attributes"),
        pytest.param(["helpful 1", "verbose 2", "safe 3"], None, id="A-F14-numbered-attributes"),
        pytest.param(["joy", "anger", "fear"], None, id="A-F14-moods"),
        pytest.param(["1-2", "1-3", "2"], None, id="A-F14-ranges"),
    ],
)
def test_labels_that_are_no_order_are_refused(names, problem_type):
    with pytest.raises(UserError, match="|".join(names)):
        classifier(names, problem_type=problem_type)


# --- which pad, which side, which context, which head in which dtype


FAMILIES = {
    "M4-modernbert-decoder": (
        hf.ModernBertDecoderForSequenceClassification,
        hf.ModernBertDecoderConfig,
        BERT | dict(pad_token_id=V - 1, eos_token_id=3, local_attention=8),
    ),
    "M4-mbart": (hf.MBartForSequenceClassification, hf.MBartConfig, BART),
    "M4-bart": (hf.BartForSequenceClassification, hf.BartConfig, BART),
    "M4-ctrl": (
        hf.CTRLForSequenceClassification,
        hf.CTRLConfig,
        dict(vocab_size=V, n_embd=32, dff=64, n_layer=2, n_head=4, pad_token_id=V - 1)
        | dict(initializer_range=0.3),
    ),
    "M4-xlnet-pads-left": (
        hf.XLNetForSequenceClassification,
        hf.XLNetConfig,
        dict(vocab_size=V, d_model=32, n_layer=2, n_head=4, d_inner=64, initializer_range=0.3)
        | dict(pad_token_id=0),
    ),
    "M4-fnet-never-pads": (
        hf.FNetForSequenceClassification,
        hf.FNetConfig,
        {k: v for k, v in BERT.items() if k != "num_attention_heads"},
    ),
    "M12-t5": (hf.T5ForSequenceClassification, hf.T5Config, T5),
    "M7-gemma3": (
        hf.Gemma3ForSequenceClassification,
        lambda **config: hf.Gemma3Config(
            text_config=LLAMA | dict(head_dim=8, pad_token_id=0, initializer_range=0.3),
            vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1)
            | dict(num_attention_heads=2, image_size=28, patch_size=14),
            mm_tokens_per_image=4,
            **config,
        ),
        {},
    ),
}


@pytest.mark.parametrize("kind, config, sizes", FAMILIES.values(), ids=FAMILIES)
def test_a_text_in_a_batch_has_the_logits_of_transformers_alone(kind, config, sizes, tmp_path):
    rm = assert_as_alone(saved(tmp_path / "m", kind, config, num_labels=1, **sizes))
    assert rm.together == (kind is not hf.FNetForSequenceClassification)
    assert rm.padding_side == ("left" if "XLNet" in kind.__name__ else "right") or not rm.together
    if kind is hf.Gemma3ForSequenceClassification:
        assert rm.context == 64


def test_training_pads_as_was_found_out_at_load(tmp_path, monkeypatch):
    """M4's kind: a step that padded on the other side would train another model."""
    kind, config, sizes = FAMILIES["M4-xlnet-pads-left"]
    path = saved(tmp_path / "m", kind, config, num_labels=1, **sizes)
    data = tiny.rows(tmp_path / "d.jsonl", {"chosen": "good {n}", "rejected": "bad {n} film"})
    trained, one_pass = set(), RewardModel.one_pass

    def recorded(self, rows):
        if torch.is_grad_enabled():
            trained.add(self.padding_side)
        return one_pass(self, rows)

    monkeypatch.setattr(RewardModel, "one_pass", recorded)
    flags = f"--model {path} --dataset {data} --steps 1 --device cpu --out {tmp_path / 'o'}"
    train_rm.main(flags.split())
    assert trained == {"left"}


def test_a_roberta_takes_as_many_tokens_as_it_has_positions_for(tmp_path):
    """M4's kind: 64 positions, of which the first two are taken."""
    config = BERT | dict(pad_token_id=1)
    path = saved(
        tmp_path / "m",
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig,
        num_labels=2,
        **config,
    )
    rm = rm_of(path)
    assert rm.context == 62
    rm.logits([[5] * 62])
    with pytest.raises(UserError, match="at most 62"):
        rm.logits([[5] * 63])


def test_bfloat16_acts_on_the_body_of_an_encoder_and_not_on_its_head(tmp_path):
    """M19: it changed no bit."""
    path = saved(
        tmp_path / "m",
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig,
        num_labels=2,
        **DISTIL,
    )
    rm = rm_of(path)
    rows = [rm.encode(*text) for text in zip(PROMPTS, ANSWERS)]
    exact = rm.logits(rows)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = rm.logits(rows)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1
    assert not torch.equal(rounded, rounded.bfloat16().float())


# --- new heads


@pytest.mark.parametrize("kind", [hf.BertForMaskedLM, hf.BertForTokenClassification])
def test_a_pooler_is_new_with_a_new_head(kind, tmp_path):
    """A-G4: masked language models have none. A token classifier stays refused."""
    path = saved(tmp_path / "m", kind, hf.BertConfig, **BERT)
    if kind is hf.BertForTokenClassification:
        refused(rm_of, path)
    else:
        assert from_base(path).score(PROMPTS, ANSWERS).isfinite().all()
        with_tensors(path, bert__encoder__layer__0__output__dense__bias=None)
        assert "layer.0.output.dense.bias" in refused(from_base, path)


def test_a_family_without_embeddings_is_one_line(tmp_path):
    """M18."""
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    sizes |= dict(num_hash_buckets=64, local_transformer_stride=16, max_position_embeddings=128)
    refused(from_base, saved(tmp_path / "m", hf.CanineModel, hf.CanineConfig, **sizes))


# --- adapters


def test_adapters_act_where_a_model_reads_the_weight_and_does_not_call_the_layer(tmp_path):
    """M12: T5 and Mamba reach inside their layers."""
    t5 = from_base(saved(tmp_path / "t5", hf.T5ForConditionalGeneration, hf.T5Config, **T5))
    sizes = dict(vocab_size=V, hidden_size=32, state_size=4, num_hidden_layers=2)
    torch.manual_seed(0)
    mamba = hf.MambaForCausalLM(hf.MambaConfig(**sizes)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    runs = [(t5.model, lambda: t5.forward([[5, 6, 3]])), (mamba, lambda: mamba(ids).logits)]
    for model, forward in runs:
        add_lora_(model, 4)
        for parameter in adapter_parameters(model):
            torch.nn.init.normal_(parameter, std=0.3)
        with_adapters = forward()
        with_adapters.square().sum().backward()
        used = [p for p in adapter_parameters(model) if p.grad is not None and p.grad.any()]
        assert len(used) >= 0.9 * len(adapter_parameters(model))
        merge_lora_(model)
        torch.testing.assert_close(forward(), with_adapters, atol=1e-4, rtol=1e-3)


class Router(torch.nn.Linear):
    def forward(self, x):
        logits = super().forward(x)
        return logits.softmax(-1), logits


class Gate(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class Plain(torch.nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("kind, adapted", [(Router, False), (Gate, False), (Plain, True)])
def test_layers_derived_from_linear_get_adapters_if_they_are_linear(kind, adapted):
    """M11: a router gave a tuple. Falcon's layers are of a class of their own, too."""
    model = tiny.model(TOKENIZER)
    torch.manual_seed(0)
    model.model.layers[0].mlp.router = kind(32, 4)
    add_lora_(model, 2)
    assert ("model.layers.0.mlp.router" in lora_layers(model)) == adapted
    assert "model.layers.0.mlp.up_proj" in lora_layers(model)


def adapter(folder, base, rank=2, width=32):
    """A LoRA adapter of a q_proj in PEFT's files, written by hand; no tokenizer beside it."""
    folder.mkdir()
    torch.manual_seed(0)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.randn(rank, width)}
    tensors[f"{name}.lora_B.weight"] = torch.randn(32, rank)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = dict(peft_type="LORA", bias="none", r=rank, lora_alpha=4, task_type="CAUSAL_LM")
    edit(folder / "adapter_config.json", base_model_name_or_path=base, **config)
    return tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] * 4 / rank


@pytest.mark.parametrize("named", ["absolute", "beside"])
def test_an_adapter_without_a_tokenizer_takes_that_of_its_base(named, tmp_path):
    """A-H8; B20d: the base's path relative to the adapter."""
    base = tiny.policy(tmp_path / "base", "plain")
    delta = adapter(tmp_path / "adapter", base if named == "absolute" else "../base")
    model, tokenizer = load_policy(str(tmp_path / "adapter"))
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    weight = load_file(Path(base) / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight, weight + delta)


@pytest.mark.parametrize("base", ["../base", "/nowhere/base", "no/such/base", "~/base"])
def test_the_base_of_an_adapter_that_is_not_there_is_named(base, tmp_path):
    """B20a and d."""
    adapter(tmp_path / "adapter", base)
    assert f"its base model {base}" in refused(load_policy, tmp_path / "adapter")


def test_an_adapter_of_another_width_is_refused_with_both_shapes(tmp_path):
    """B20c."""
    adapter(tmp_path / "adapter", tiny.policy(tmp_path / "base"), width=48)
    line = refused(load_policy, tmp_path / "adapter")
    assert "q_proj.weight" in line and "[32, 48]" in line and "[32, 32]" in line


@pytest.mark.parametrize(
    "variant",
    [
        {"layer_replication": [[0, 2], [1, 2]]},
        {"alora_invocation_tokens": [5, 6]},
        {"use_qalora": True},
        {"use_dora": True},
    ],
    ids=lambda variant: min(variant),
)
def test_an_adapter_that_acts_otherwise_than_plain_lora_is_refused(variant, tmp_path):
    """Kind of B20: its settings were not read, and it was added as plain LoRA."""
    adapter(tmp_path / "adapter", tiny.policy(tmp_path / "base"))
    edit(tmp_path / "adapter/adapter_config.json", **variant)
    assert "another kind than plain LoRA" in refused(load_policy, tmp_path / "adapter")


def test_an_adapter_in_a_pickle_is_read(tmp_path):
    """As PEFT wrote them before."""
    delta = adapter(tmp_path / "adapter", base := tiny.policy(tmp_path / "base"))
    file = tmp_path / "adapter/adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    model, name = load_policy(str(tmp_path / "adapter"))[0], "model.layers.0.self_attn.q_proj"
    weight = load_file(Path(base) / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(model.get_submodule(name).weight, weight + delta)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache without a network: a function that puts a folder there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(folder, name):
        there = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, there / "snapshots/abc")
        (there / "refs").mkdir()
        (there / "refs/main").write_text("abc")

    return put


def test_adapters_on_the_hub_are_loaded_with_their_base(hub, tmp_path):
    """B20: `some/adapter` was looked for as a whole model."""
    hub(tiny.policy(tmp_path / "base"), "some/base")
    delta = adapter(tmp_path / "adapter", "some/base")
    hub(tmp_path / "adapter", "some/adapter")
    name = "model.layers.0.self_attn.q_proj"
    weight = load_policy("some/base")[0].get_submodule(name).weight
    adapted = load_policy("some/adapter")[0].get_submodule(name).weight
    torch.testing.assert_close(adapted, weight + delta)


def test_a_reward_models_adapters_on_the_hub_bring_their_head(hub, tmp_path):
    """B20."""
    adapter(tmp_path / "adapter", tiny.policy(tmp_path / "base"))
    file = tmp_path / "adapter/adapter_model.safetensors"
    head = {"base_model.model.score.weight": torch.ones(1, 32)}
    save_file(load_file(file) | head, file, {"format": "pt"})
    hub(tmp_path / "adapter", "some/adapter")
    assert torch.equal(rm_of("some/adapter").model.score.weight, torch.ones(1, 32))


@pytest.mark.parametrize("ends", ["x", [[3]], 3.5, [3, "x"], True])
def test_end_tokens_that_are_no_ids_are_one_line(ends, tmp_path):
    """S5: a traceback after everything was loaded."""
    path = tiny.policy(tmp_path / "m")
    edit(Path(path) / "generation_config.json", eos_token_id=ends)
    assert "generation_config.json" in refused(load_policy, path)


def test_a_text_in_place_of_a_list_of_texts_is_refused(tmp_path):
    """Its letters were scored one by one."""
    rm = rm_of(tiny.reward_model(tmp_path / "m"))
    for texts in (("abc", "abc"), (["a", "b"], "ab"), ("ab", ["a", "b"])):
        with pytest.raises(ValueError, match="two lists"):
            rm.score(*texts)


# --- tokenizers


def larger_tokenizer(folder, special):
    """A policy and a tokenizer with one token more than it has embeddings."""
    tok = tiny.tokenizer("plain")
    made = tiny.model(tok, tie_word_embeddings=True)
    tok.add_tokens(["<image_soft_token>"])
    path = tiny.save(folder, made, tok)
    if not special:
        file = Path(path) / "tokenizer.json"
        content = json.loads(file.read_text())
        content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < V]
        content["model"]["vocab"]["zq"] = V
        file.write_text(json.dumps(content))
    return path


def test_a_token_beyond_the_embedding_is_a_note_until_a_text_holds_it(tmp_path, capsys):
    """A-G1: gemma-3-1b has such a token."""
    path = larger_tokenizer(tmp_path / "m", special=True)
    model, tokenizer = load_policy(path)
    assert "<image_soft_token>" in capsys.readouterr().out
    model(**tokenizer(["a text"], return_tensors="pt"))
    with pytest.raises(UserError, match="holds <image_soft_token>"):
        model(**tokenizer(["<image_soft_token> what"], return_tensors="pt"))
    line = refused(load_policy, larger_tokenizer(tmp_path / "plain", special=False))
    assert "do not belong together" in line and "zq" in line


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    """A-H8: a message that ended in a colon."""
    path = Path(tiny.policy(tmp_path / "m"))
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    assert f"no tokenizer in {path}" in refused(load_policy, path)


def test_a_missing_sentencepiece_is_named(tmp_path, monkeypatch):
    """A-H2: tiktoken was blamed."""
    for name in ("sentencepiece", "protobuf"):
        monkeypatch.setattr(f"minalign.models.broken.is_{name}_available", lambda: False)
    path = Path(tiny.policy(tmp_path / "m", "plain"))
    (path / "tokenizer.json").unlink()
    edit(path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    (path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    line = refused(load_policy, path)
    assert "tokenizer.model needs sentencepiece and protobuf" in line and "tiktoken" not in line


# --- weights, attention, names


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("make, load", [(tiny.policy, load_policy), (tiny.reward_model, rm_of)])
def test_a_weight_that_is_not_finite_is_named(make, load, value, tmp_path):
    """S9."""
    path, name = make(tmp_path / "m"), "model.layers.1.mlp.up_proj.weight"
    weight = load_file(Path(path) / "model.safetensors")[name]
    weight[3, 5] = value
    with_tensors(path, **{name: weight})
    assert name in refused(load, path)


@pytest.mark.parametrize("value", ["evil/kernel", "flash_attention_2", "eager", 5, {"": "x/y"}])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_the_way_to_compute_attention_is_never_taken_from_a_config(key, value, tmp_path):
    """S1."""
    path = tiny.policy(tmp_path / "m")
    edit(Path(path) / "config.json", **{key: value, "experts_implementation": "evil/kernel"})
    assert load_policy(path)[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "name",
    ["there/rm-11", "a/b/c", "./no", "../no", "~/no", "/no/where", "x" * 300, "x/" * 200, "", "\0"]
    + ["there/model.safetensors", "http://x.y/z"],
)
@pytest.mark.parametrize("load", [load_policy, rm_of])
def test_a_name_that_no_hub_can_have_is_refused_at_once(load, name, tmp_path, monkeypatch):
    """S33 and S15: 49 seconds, or a traceback."""
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("there/model.safetensors").write_bytes(b"")
    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", None)
    monkeypatch.setattr("time.sleep", None)
    assert "no such folder" in refused(load, name)


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path, monkeypatch):
    """S33: transformers asks twelve times, with pauses."""
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: asked.append(seconds))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: asked.append("name") or 1 / 0)
    monkeypatch.setattr("socket.socket.connect", lambda *_: asked.append("connect") or 1 / 0)
    assert "local copy" in refused(load_policy, "nobody/nothing")
    assert set(asked) <= {"name", "connect"} and len(asked) <= 2


# --- S5: broken folders


def broken(rng, folder):
    """Change one file of a model's folder; returns what was done."""
    values = [None, 7, -1, "x", [], {}, True, 1e300, [[1]], 10**400, {"a": {"b": []}}, [None]]
    wholes = [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"7",
        b"\xff\xfe{",
        b"version https://git-lfs.github.com",
    ]
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    file = rng.choice([*files, folder / "added_tokens.json", folder / "adapter_config.json"])
    if not file.exists() or rng.random() < 0.4:
        content = file.read_bytes() if file.exists() else b"{}"
        file.write_bytes(rng.choice([*wholes, content[: rng.randrange(len(content))]]))
        return f"{file.name} {file.read_bytes()[:20]}"
    if file.suffix == ".safetensors":
        file.unlink()
        return f"{file.name} removed"
    content = node = json.loads(file.read_text())
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.6:
            node = node[key]
            continue
        node[key] = rng.choice(values)
        file.write_text(json.dumps(content))
        return f"{file.name} {key} {node[key]!r:.30}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    tiny.reward_model(root / "rm")
    tiny.policy(root / "lm")
    tok = tiny.tokenizer("chatml")
    tiny.model(tok, tie_word_embeddings=True).save_pretrained(root / "sh", max_shard_size="20KB")
    tok.save_pretrained(root / "sh")
    return root


def fuzz(folders, folder, seed):
    """Whatever the change: loaded, or one line."""
    rng = random.Random(seed)
    kind = rng.choice(["rm", "lm", "sh"])
    shutil.copytree(folders / kind, folder, copy_function=shutil.copyfile)
    what = broken(rng, folder)
    try:
        loaded = rm_of(str(folder)) if kind == "rm" else load_policy(str(folder))
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error), what
        return False
    if kind == "rm" and loaded.context > 50:
        loaded.score(["a"], ["b"])
    return True


@pytest.mark.parametrize("seed", range(60))
def test_a_broken_folder_is_one_line(seed, folders, tmp_path):
    """S5."""
    fuzz(folders, tmp_path / "m", seed)


@pytest.mark.slow
def test_a_hundred_more_broken_folders_are_one_line_each(folders, tmp_path):
    """S5, and some of them are refused indeed."""
    loaded = [fuzz(folders, tmp_path / str(seed), seed) for seed in range(100, 200)]
    assert 30 < loaded.count(False) < 95


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("config.json", "[]", "config.json: got []"),
        ("config.json", None, "no config.json in"),
        ("tokenizer.json", '{"a', "tokenizer.json: "),
        ("added_tokens.json", "[]", "added_tokens.json: got []"),
        ("generation_config.json", "null", "generation_config.json: got None"),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("model.safetensors", "x", "model.safetensors: "),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}', "'../x"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "/x.safetensors"}}', "'/x"),
    ],
)
def test_the_file_at_fault_is_named(file, content, words, folders, tmp_path):
    """S5."""
    shutil.copytree(folders / "lm", tmp_path / "m", copy_function=shutil.copyfile)
    if content is None:
        (tmp_path / "m" / file).unlink()
    else:
        (tmp_path / "m" / file).write_text(content)
    line = refused(load_policy, tmp_path / "m")
    assert words in line and not line.endswith(":")
