"""Adapters: what they add is alpha / r B A and nothing else.

That holds wherever they are trained, merged, looked at, saved or loaded. Llama has nn.Linear layers
and an LM head of its own. GPT-2 has Conv1D layers, with weights (in, out), and tied embeddings.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import train_policy
from minalign import merge, rollout
from minalign.data import toy
from minalign.data.chat import TokenizedPrompt, encode_prompt
from minalign.logprobs import token_logprobs
from minalign.merge import ema_update_
from minalign.models.activations import checkpoint_activations_
from minalign.models.loading import load_policy
from minalign.models.lora import (
    AdapterView,
    LoraLinear,
    adapter_labels,
    adapter_parameters,
    add_lora_,
    dense_state,
    lora_layers,
    merge_lora_,
)
from minalign.models.rewards import RewardFunction
from minalign.models.saving import save_policy
from minalign.reward import RewardModel
from minalign.rollout import completion_logits
from minalign.running.errors import UserError
from minalign.running.run import Run
from minalign.task import Task

TOKENIZER = toy.make_tokenizer()
RANK, ALPHA = 3, 5.0  # alpha / r is neither 1 nor 2
LAYERS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
PROMPTS = [
    "overall , the plot is",
    "again , the music is very dull but the cast is",
    "frankly , the",
]
COMPLETIONS = [" good .", " utterly superb and the plot is weak but the camera is odd .", " ending"]


def make_model(family, device="cpu", seed=0, width=32):
    torch.manual_seed(seed)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=len(TOKENIZER),
            n_positions=64,
            n_embd=width,
            n_layer=2,
            n_head=2,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
        )
        return GPT2LMHeadModel(config).to(device).eval()
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(device).eval()


@torch.no_grad()
def randomize_(model, seed=1):
    """A and B of every adapter at random, on any device the same."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model):
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def make_adapted(family, device="cpu", seed=0, **options):
    model = make_model(family, device, seed)
    add_lora_(model, RANK, ALPHA, **options)
    randomize_(model)
    return model


def dense_copy(family, adapted, device="cpu", scaling=ALPHA / RANK):
    """The plain model with W + scaling B A, by hand and in float64."""
    model, adapters = make_model(family, device), adapted.state_dict()
    with torch.no_grad():
        for name, module in model.named_modules():
            if f"{name}.lora_A" in adapters:
                A, B = (adapters[f"{name}.lora_{part}"].double() for part in "AB")
                delta = scaling * B @ A
                delta = delta.T if isinstance(module, Conv1D) else delta
                module.weight.copy_(module.weight.double() + delta)
    return model


def ids_like(device="cpu", rows=3, length=7, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, len(TOKENIZER), (rows, length), generator=generator).to(device)


@torch.no_grad()
def logits_of(model):
    return model(input_ids=ids_like(next(iter(model.modules())).device)).logits


def assert_near(got, expected, atol=1e-4):
    torch.testing.assert_close(got, expected, atol=atol, rtol=1e-4)


def assert_same_tensors(got, expected):
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


both_families = pytest.mark.parametrize("family", ["gpt2", "llama"])


# --- what an adapter adds


@both_families
def test_a_fresh_adapter_changes_nothing(family, device):
    model = make_model(family, device)
    before = logits_of(model)
    add_lora_(model, RANK, ALPHA)
    assert torch.equal(logits_of(model), before)
    for layer in lora_layers(model).values():
        assert layer.lora_A.any() and layer.lora_A.std() > 0


@both_families
def test_the_output_is_that_of_the_dense_weights(family, device):
    model = make_adapted(family, device)
    expected = logits_of(dense_copy(family, model, device))
    added = (logits_of(make_model(family, device)) - expected).abs().max()
    assert added > 0.5, "the case needs adapters that matter"
    assert_near(logits_of(model), expected, atol=1e-3 if device.type == "cuda" else 1e-4)


@pytest.mark.parametrize("alpha, factor", [(None, 2.0), (1.0, 1 / RANK)])
def test_alpha_counts_by_the_rank(alpha, factor):
    model = make_model("llama")
    add_lora_(model, RANK, alpha)
    randomize_(model)
    assert_near(logits_of(model), logits_of(dense_copy("llama", model, scaling=factor)))


@both_families
def test_dense_state_and_merging_give_the_plain_model(family):
    model, plain = make_adapted(family), make_model(family)
    expected, live = dense_copy(family, model).state_dict(), copy.deepcopy(model.state_dict())
    state = {name: tensor.clone() for name, tensor in dense_state(model).items()}
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert_near(state[name], tensor, atol=1e-6)
        has_adapter = name.split(".")[-2] in LAYERS[family] and name.endswith("weight")
        assert torch.equal(state[name], plain.state_dict()[name]) != has_adapter
    assert_same_tensors(model.state_dict(), live)  # looked at, not changed

    merge_lora_(model)
    assert not lora_layers(model)
    modules, expected = (
        [(name, type(module)) for name, module in each.named_modules()] for each in (model, plain)
    )
    assert modules == expected
    assert_same_tensors(model.state_dict(), state)
    assert all(parameter.requires_grad for parameter in model.parameters())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family == "gpt2")


@both_families
def test_a_saved_policy_is_a_plain_checkpoint(family, tmp_path):
    model = make_adapted(family)
    save_policy(model, TOKENIZER, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert_near(logits_of(loaded), logits_of(model))
    assert_same_tensors(loaded.state_dict(), dense_state(model))
    assert lora_layers(model), "the live model keeps its adapters"
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert not [name for name in saved if "lora" in name or ".base." in name]
    assert ("lm_head.weight" in saved) == (family == "llama")


def test_a_model_takes_new_adapters_after_merging():
    """As in WARP's iterations."""
    model = make_adapted("gpt2")
    merge_lora_(model)
    before = logits_of(model)
    add_lora_(model, 2)
    assert torch.equal(logits_of(model), before)
    assert {layer.lora_A.shape[0] for layer in lora_layers(model).values()} == {2}


# --- gradients


def loss_of(model, ids):
    logits = model(input_ids=ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@both_families
def test_gradients_are_those_of_the_dense_weight(family):
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, in float64. Nothing else has a gradient."""
    model, ids = make_adapted(family).double(), ids_like()
    dense = copy.deepcopy(model)
    merge_lora_(dense)
    loss_of(model, ids).backward()
    loss_of(dense, ids).backward()
    for name, layer in lora_layers(model).items():
        gradient = dense.get_submodule(name).weight.grad
        gradient = gradient.T if isinstance(layer.base, Conv1D) else gradient
        for got, expected in (
            (layer.lora_B.grad, gradient @ layer.lora_A.T),
            (layer.lora_A.grad, layer.lora_B.T @ gradient),
        ):
            assert expected.abs().max() > 1e-4
            torch.testing.assert_close(got, ALPHA / RANK * expected, rtol=1e-8, atol=1e-10)
    trained = {id(parameter) for parameter in adapter_parameters(model)}
    assert {id(p) for p in model.parameters() if p.grad is not None} == trained


@both_families
def test_gradients_are_those_of_finite_differences(family):
    """Of the dense model, whose weights are worked out with one element of A or B moved."""
    model, ids = make_adapted(family).double(), ids_like()
    loss_of(model, ids).backward()
    layer = list(lora_layers(model))[1]
    for name in (f"{layer}.lora_A", f"{layer}.lora_B"):
        gradient = model.get_parameter(name).grad
        place, losses = divmod(gradient.abs().argmax().item(), gradient.shape[1]), []
        # No smaller: parts of Llama compute in float32 whatever the model's dtype.
        for step in (1e-3, -1e-3):
            moved, dense = copy.deepcopy(model), make_model(family).double()
            moved.get_parameter(name).data[place] += step
            dense.load_state_dict(dense_state(moved))
            losses.append(loss_of(dense, ids).item())
        assert gradient[place].abs() > 0.05
        assert gradient[place].item() == pytest.approx((losses[0] - losses[1]) / 2e-3, abs=5e-4)


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_names(model):
    return {f"{layer}.{part}" for layer in lora_layers(model) for part in ("lora_A", "lora_B")}


def moved_by_a_step(model, loss):
    """The names of the tensors that one step of AdamW changes."""
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss.backward()
    optimizer.step()
    after = model.state_dict()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


@both_families
def test_adapters_alone_are_trained_and_all_of_them(family):
    model = make_adapted(family)
    trained = trained_names(model)
    assert trained == adapter_names(model)
    assert moved_by_a_step(model, loss_of(model, ids_like())) == trained


def make_reward_model(family="llama", num_labels=1):
    return RewardModel.from_backbone(make_model(family), toy.make_tokenizer(), num_labels)


@both_families
def test_a_reward_head_is_trained_in_full(family):
    reward_model = make_reward_model(family, num_labels=5)
    model = reward_model.model
    add_lora_(model, RANK)
    randomize_(model)
    trained = trained_names(model)
    assert trained == adapter_names(model) | {"score.weight"}
    rows = [reward_model.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS)]
    assert moved_by_a_step(model, reward_model.forward(rows).square().sum()) == trained


@both_families
def test_recomputed_activations_change_no_gradient(family):
    """Also with frozen embeddings, where no input of the first layer has a gradient."""
    model = make_adapted(family)
    expected = copy.deepcopy(model)
    checkpoint_activations_(model)
    for each in (model, expected):
        loss_of(each, ids_like()).backward()
    for got, want in zip(adapter_parameters(model), adapter_parameters(expected)):
        assert want.grad.any()
        torch.testing.assert_close(got.grad, want.grad)


@both_families
def test_adapters_under_autocast_have_float32_gradients(family, device):
    model = make_adapted(family, device)
    expected = logits_of(model)
    with torch.autocast(device.type, torch.bfloat16):
        assert (logits_of(model) - expected).abs().mean() < 0.05 * expected.abs().mean()
    # of its own, as in the loops: autocast of torch 2.10 keeps what it cast without gradients
    with torch.autocast(device.type, torch.bfloat16):
        loss = loss_of(model, ids_like(device))
    loss.backward()
    assert {p.grad.dtype for p in adapter_parameters(model)} == {torch.float32}


# --- views: adapters off, or others


def others_of(model, seed=7):
    """Other weights for the adapters."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(p.shape, generator=generator) for p in adapter_parameters(model)]
    return [0.3 * weight.to(p.device) for weight, p in zip(drawn, adapter_parameters(model))]


def with_weights(model, weights):
    """A copy of the model whose adapters have these weights."""
    copied = copy.deepcopy(model)
    for parameter, weight in zip(adapter_parameters(copied), weights):
        parameter.data.copy_(weight)
    return copied


def snapshot(model):
    """What a look through a view must leave as it was."""
    parameters = dict(model.named_parameters())
    places = [(name, p.data_ptr(), p.requires_grad) for name, p in parameters.items()]
    on = [layer.on for layer in lora_layers(model).values()]
    training = [module.training for module in model.modules()]
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return places, on, training, values


def assert_untouched(model, before):
    after = snapshot(model)
    assert after[:3] == before[:3]
    assert_same_tensors(after[3], before[3])


@both_families
def test_a_view_without_adapters_is_the_model_that_it_started_from(family, device):
    model = make_adapted(family, device)
    before, live = snapshot(model), logits_of(model)
    view = AdapterView(model, None)
    with torch.no_grad():
        logits = view(input_ids=ids_like(device)).logits
    assert torch.equal(logits, logits_of(make_model(family, device)))
    assert not torch.equal(logits, live)
    assert_untouched(model, before)
    assert torch.equal(logits_of(model), live)
    assert view.parameters() == [] and view.config is model.config


@both_families
def test_a_view_with_other_weights_is_the_model_with_those(family, device):
    model = make_adapted(family, device)
    others = others_of(model)
    expected = with_weights(model, others)
    before, live, kept = snapshot(model), logits_of(model), [weight.clone() for weight in others]
    with torch.no_grad():
        logits = AdapterView(model, others)(input_ids=ids_like(device)).logits
    assert torch.equal(logits, logits_of(expected))
    assert not torch.equal(logits, live)
    assert_untouched(model, before)
    assert torch.equal(logits_of(model), live)
    assert all(torch.equal(a, b) for a, b in zip(others, kept))


@pytest.mark.parametrize("kind", ["off", "other"])
def test_an_error_inside_a_view_leaves_the_model_as_it_was(kind):
    model = make_adapted("llama")
    model.train()
    before = snapshot(model)
    seen = []

    def fail(module, args, output):
        seen.append(lora_layers(model)["model.layers.0.self_attn.q_proj"].on)
        raise RuntimeError("out of memory")

    hook = model.model.layers[1].register_forward_hook(fail)
    view = AdapterView(model, None if kind == "off" else others_of(model))
    ones = torch.ones(2, 3, dtype=torch.long)
    ids, tokens = ids_like(rows=2, length=3), ids_like(rows=2, length=3, seed=4)
    with pytest.raises(RuntimeError, match="out of memory"):
        completion_logits(view, ids, ones, tokens, ones)
    assert seen[0] == (kind == "other"), "the case must fail inside"
    hook.remove()
    assert_untouched(model, before)


@both_families
@pytest.mark.parametrize("kind", ["off", "other"])
def test_a_view_is_scored_as_a_model(family, kind, device):
    """By rollout.completion_logits: padded prompts, dropout off, modes put back."""
    model = make_adapted(family, device, dropout=0.5)
    others = others_of(model)
    expected = make_model(family, device)
    if kind == "other":
        expected = dense_copy(family, with_weights(model, others), device)
    prompts, tokens = ids_like(device, length=5), ids_like(device, length=4, seed=4)
    prompt_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]], device=device)
    rollout_of = (prompts, prompt_mask, tokens, torch.ones_like(tokens))
    model.train()
    before = snapshot(model)
    view = AdapterView(model, None if kind == "off" else others)
    with torch.no_grad():
        logits = completion_logits(view, *rollout_of)
        wanted = completion_logits(expected, *rollout_of)
    assert_near(logits, wanted, atol=1e-3 if device.type == "cuda" else 1e-4)
    assert_untouched(model, before)


def test_an_average_moves_the_view_and_not_the_model():
    model = make_adapted("llama")
    start = [p.detach().clone() for p in adapter_parameters(model)]
    view = AdapterView(model, [weight.clone() for weight in start])
    assert_near(view(input_ids=ids_like()).logits, logits_of(model))
    randomize_(model, seed=2)
    before, theta = snapshot(model), [p.detach().clone() for p in adapter_parameters(model)]
    ema_update_(view.parameters(), adapter_parameters(model), 0.25)
    assert_untouched(model, before)
    average = [0.75 * a + 0.25 * b for a, b in zip(start, theta)]
    for got, expected in zip(view.parameters(), average):
        assert_near(got, expected, atol=1e-6)
    averaged = with_weights(model, average)
    assert_near(view(input_ids=ids_like()).logits.detach(), logits_of(averaged))


def test_a_view_without_adapters_has_nothing_to_train():
    model = make_adapted("llama")
    assert not AdapterView(model, None)(input_ids=ids_like()).logits.requires_grad


# --- targets


@both_families
def test_default_targets_are_the_linear_layers_of_the_body(family):
    for model in (make_model(family), make_reward_model(family).model):
        add_lora_(model, RANK)
        layers = lora_layers(model)
        assert {name.split(".")[-1] for name in layers} == set(LAYERS[family])
        # GPT-2 has two layers called c_proj in each block.
        assert len(layers) == {"gpt2": 2 * 4, "llama": 2 * 7}[family]
        assert all(name.startswith(f"{model.base_model_prefix}.") for name in layers)


@pytest.mark.parametrize(
    "family, targets, expected",
    [
        ("llama", ["q_proj"], ["self_attn.q_proj"]),
        ("llama", ["v_proj", "up_proj"], ["self_attn.v_proj", "mlp.up_proj"]),
        ("gpt2", ["c_proj"], ["attn.c_proj", "mlp.c_proj"]),
    ],
)
def test_only_the_named_layers_get_adapters(family, targets, expected):
    model = make_adapted(family, targets=targets)
    prefix = {"llama": "model.layers", "gpt2": "transformer.h"}[family]
    layers = {f"{prefix}.{i}.{name}" for i in range(2) for name in expected}
    assert set(lora_layers(model)) == layers
    assert_near(logits_of(model), logits_of(dense_copy(family, model)))
    assert trained_names(model) == adapter_names(model)


@pytest.mark.parametrize(
    "targets, named",
    [
        (["query"], "query"),
        (["q_proj", "nothing"], "nothing"),
        (["lm_head"], "lm_head"),
        (["self_attn"], "self_attn"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error(targets, named):
    model = make_model("llama")
    with pytest.raises(UserError) as error:
        add_lora_(model, RANK, targets=targets)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("--lora-targets")
    assert f"called {named}:" in message
    assert message.endswith(", ".join(sorted(LAYERS["llama"])))
    # nothing was done by half
    assert all(p.requires_grad for p in model.parameters()) and not lora_layers(model)


def test_a_reward_head_is_no_target():
    with pytest.raises(UserError, match="called score"):
        add_lora_(make_reward_model().model, RANK, targets=["score"])


def test_adapters_on_adapters_are_an_error():
    model = make_adapted("llama", targets=["q_proj"])
    with pytest.raises(UserError, match="already") as error:
        add_lora_(model, RANK, targets=["v_proj"])
    assert "\n" not in str(error.value)
    assert len(lora_layers(model)) == 2


# --- dropout


@pytest.mark.parametrize(
    "make", [lambda: torch.nn.Linear(6, 4), lambda: Conv1D(4, 6)], ids=["linear", "conv1d"]
)
def test_dropout_acts_in_training_mode_before_the_adapter_alone(make):
    base = make()
    layer, x = LoraLinear(base, 2, 2.0, dropout=0.25).double(), torch.randn(20_000, 6).double()
    layer.train()
    assert torch.equal(layer(x), base(x)), "the base layer's input is dropped"  # B is 0
    torch.nn.init.normal_(layer.lora_B)
    x = x[:1].expand(20_000, 6)
    layer.eval()
    expected = layer(x[:1])
    assert torch.equal(layer(x[:1]), expected)
    assert_near(expected, base(x[:1]) + x[:1] @ layer.lora_A.T @ layer.lora_B.T, atol=1e-6)
    layer.train()
    drawn = layer(x)
    # each input is there or not, on its own
    assert len(drawn.round(decimals=6).unique(dim=0)) == 2**6
    # what stays counts 1 / (1 - p)
    torch.testing.assert_close(drawn.mean(0, keepdim=True), expected, atol=0.05, rtol=0)
    layer.on = False
    assert torch.equal(layer(x), base(x))


def test_no_dropout_is_no_dropout():
    model = make_adapted("llama")
    expected = logits_of(model)
    assert torch.equal(logits_of(model.train()), expected)


def test_adapters_are_put_on_in_the_mode_of_their_model():
    """On a model in evaluation mode, as all loaded ones are, dropout waits for train()."""
    for training in (False, True):
        model = make_model("llama").train(training)
        add_lora_(model, RANK, dropout=0.5)
        assert {layer.training for layer in lora_layers(model).values()} == {training}


def test_dropout_of_a_reward_model_acts_in_training_alone():
    """It acts in passes with gradients. Scores and evaluations are no random numbers."""
    reward_model = make_reward_model()
    add_lora_(reward_model.model, RANK, ALPHA, dropout=0.5)
    randomize_(reward_model.model)
    rows = [reward_model.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS)]
    expected = RewardModel(copy.deepcopy(reward_model.model), reward_model.tokenizer)
    merge_lora_(expected.model)
    for _ in range(2):
        assert not torch.equal(reward_model.forward(rows), reward_model.forward(rows))
        assert_near(reward_model.logits(rows), expected.logits(rows))
        reward_model.model.train()
        assert_near(reward_model.score(PROMPTS, COMPLETIONS), expected.score(PROMPTS, COMPLETIONS))


# --- adapters in files


def saved_base(family, folder, width=32):
    make_model(family, width=width).save_pretrained(folder)
    toy.make_tokenizer().save_pretrained(folder)
    return str(folder)


def saved_adapters(family, folder, run="run"):
    """Adapters in the folder `run` beside their base model."""
    base = saved_base(family, folder / "base")
    save_policy(make_adapted(family), TOKENIZER, folder / run, adapter_of=base)
    return folder / run


@both_families
@pytest.mark.parametrize("targets", [None, "some"])
def test_a_policy_is_saved_as_adapters(family, targets, tmp_path):
    base = saved_base(family, tmp_path / "base")
    model = make_adapted(family, targets=targets and LAYERS[family][:2])
    save_policy(model, TOKENIZER, tmp_path / "run" / "model", adapter_of=base)
    files = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert "model.safetensors" not in files
    loaded, tokenizer = load_policy(str(tmp_path / "run"))
    assert_near(logits_of(loaded), logits_of(model))
    assert_same_tensors(loaded.state_dict(), dense_state(model))
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert adapter_labels(tmp_path / "run" / "model") is None and lora_layers(model)
    config = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert config["r"] == RANK and config["task_type"] == "CAUSAL_LM"
    assert config["lora_alpha"] == pytest.approx(ALPHA)
    assert config["base_model_name_or_path"] == base and config["modules_to_save"] is None
    assert config["target_modules"] == sorted(LAYERS[family][:2] if targets else LAYERS[family])


def test_the_base_of_adapters_may_be_a_run(tmp_path):
    saved_base("llama", tmp_path / "start" / "model")
    model = make_adapted("llama")
    save_policy(model, TOKENIZER, tmp_path / "run" / "model", adapter_of=str(tmp_path / "start"))
    assert_near(logits_of(load_policy(str(tmp_path / "run"))[0]), logits_of(model))


@both_families
@pytest.mark.parametrize("num_labels", [1, 2, 10])
def test_a_reward_model_is_saved_as_adapters_and_a_head(family, num_labels, tmp_path):
    base = saved_base(family, tmp_path / "base")
    reward_model = make_reward_model(family, num_labels)
    add_lora_(reward_model.model, RANK, ALPHA)
    randomize_(reward_model.model)
    torch.nn.init.normal_(reward_model.model.score.weight)
    expected = reward_model.score(PROMPTS, COMPLETIONS)
    reward_model.save_pretrained(tmp_path / "run" / "model", adapter_of=base)
    assert adapter_labels(tmp_path / "run" / "model") == num_labels
    config = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["task_type"]) == (["score"], "SEQ_CLS")
    loaded = RewardModel.from_pretrained(str(tmp_path / "run"))
    assert loaded.num_labels == num_labels
    assert_near(loaded.score(PROMPTS, COMPLETIONS), expected)
    assert_same_tensors(loaded.model.state_dict(), dense_state(reward_model.model))

    reward_model.save_pretrained(tmp_path / "merged")
    merged = RewardModel.from_pretrained(str(tmp_path / "merged"))
    assert_near(merged.score(PROMPTS, COMPLETIONS), expected)
    assert lora_layers(reward_model.model)


def test_an_encoders_head_of_two_layers_is_saved_whole(tmp_path):
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=len(TOKENIZER),
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=2,
        max_position_embeddings=64,
        num_labels=3,
        initializer_range=0.2,
    )
    model = DistilBertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    reward_model = RewardModel(model, toy.make_tokenizer())
    add_lora_(model, RANK)
    randomize_(model)
    with torch.no_grad():
        for parameter in (*model.classifier.parameters(), *model.pre_classifier.parameters()):
            parameter.add_(torch.randn_like(parameter))
    expected = reward_model.score(PROMPTS, COMPLETIONS)
    reward_model.save_pretrained(tmp_path / "run", adapter_of=str(tmp_path / "base"))
    loaded = RewardModel.from_pretrained(str(tmp_path / "run"))
    assert_near(loaded.score(PROMPTS, COMPLETIONS), expected)


def loading_error(folder, load=load_policy):
    with pytest.raises(UserError) as error:
        load(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


@both_families
def test_adapters_of_another_shape_are_refused(family, tmp_path):
    narrow = saved_base(family, tmp_path / "narrow", width=16)
    other = saved_base("gpt2" if family == "llama" else "llama", tmp_path / "other")
    for base in (narrow, other):
        save_policy(make_adapted(family), TOKENIZER, tmp_path / "run", adapter_of=base)
        assert "does not fit the base model" in loading_error(tmp_path / "run")


def test_a_head_of_another_shape_is_refused(tmp_path):
    reward_model = make_reward_model()
    add_lora_(reward_model.model, RANK, targets=["k_proj"])  # of which the head says nothing
    base = saved_base("llama", tmp_path / "base")
    reward_model.save_pretrained(tmp_path / "run", adapter_of=base)
    path = tmp_path / "run" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"base_model.model.score.weight": torch.zeros(1, 31)}, path)
    message = loading_error(tmp_path / "run", RewardModel.from_pretrained)
    assert "score.weight does not fit" in message


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"bias": "all"},
        {"peft_type": "IA3"},
        {"peft_type": "ADALORA"},
        # layers with a scaling of their own
        {"alpha_pattern": {"q_proj": 50}},
        {"rank_pattern": {"q_proj": 1}},
        # the base is not what it was, either
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ],
)
def test_other_kinds_of_adapters_are_refused(change, tmp_path):
    run = saved_adapters("llama", tmp_path)
    path = run / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "plain LoRA" in loading_error(run)


@pytest.mark.parametrize(
    "change",
    [{key: None} for key in ("base_model_name_or_path", "r", "lora_alpha")]
    + [{"lora_alpha": "absent"}, {"base_model_name_or_path": "absent"}],
)
def test_a_config_with_holes_is_refused(change, tmp_path):
    run = saved_adapters("llama", tmp_path)
    path = run / "adapter_config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    assert "cannot be loaded" in loading_error(run)


@pytest.mark.parametrize(
    "module, name", [("lm_head", "lm_head.weight"), ("wte", "transformer.wte.weight")]
)
def test_half_of_a_tied_pair_is_refused(module, name, tmp_path):
    """PEFT's modules_to_save unties them.

    Copied into the tied weight, one would overwrite the other.
    """
    run = saved_adapters("gpt2", tmp_path)
    path = run / "adapter_model.safetensors"
    other = torch.randn(len(TOKENIZER), 32)
    save_file(load_file(path) | {f"base_model.model.{name}": other}, path)
    assert "tied" in loading_error(run)


def test_adapters_of_a_model_that_was_saved_as_adapters(tmp_path):
    """A run that starts from the adapters of another."""
    saved_adapters("llama", tmp_path, "one/model")
    model, tokenizer = load_policy(str(tmp_path / "one"))
    add_lora_(model, 2)
    randomize_(model, seed=5)
    save_policy(model, tokenizer, tmp_path / "two" / "model", adapter_of=str(tmp_path / "one"))
    assert_near(logits_of(load_policy(str(tmp_path / "two"))[0]), logits_of(model))


def test_a_reward_model_from_adapters_knows_its_pad_token(tmp_path):
    """Merged and saved again, transformers pools batches of it by that token."""
    rm = RewardModel.from_base(saved_base("llama", tmp_path / "base"), num_labels=1)
    add_lora_(rm.model, RANK)
    randomize_(rm.model)
    rm.save_pretrained(tmp_path / "run", adapter_of=str(tmp_path / "base"))
    loaded = RewardModel.from_pretrained(str(tmp_path / "run"))
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id
    loaded.save_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    texts = [begin + p + c + end for p, c in zip(PROMPTS, COMPLETIONS)]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    logits = model(**batch).logits[:, 0].detach()
    assert_near(logits, rm.score(PROMPTS, COMPLETIONS))


@pytest.mark.parametrize("missing", ["base", "adapter_model.safetensors"])
def test_half_of_an_adapter_is_refused(missing, tmp_path):
    run = saved_adapters("llama", tmp_path)
    if missing == "base":
        (tmp_path / "base").rename(tmp_path / "moved")
    else:
        (run / missing).unlink()
    assert "cannot be loaded" in loading_error(run)


def test_adapters_of_a_policy_are_no_reward_model(tmp_path):
    message = loading_error(saved_adapters("llama", tmp_path), RewardModel.from_pretrained)
    assert "no trained classification head" in message


# --- PEFT


@both_families
@pytest.mark.parametrize("targets", [None, "some"])
def test_peft_reads_our_policies(family, targets, tmp_path):
    peft = pytest.importorskip("peft")
    base = saved_base(family, tmp_path / "base")
    model = make_adapted(family, targets=targets and LAYERS[family][:2])
    save_policy(model, TOKENIZER, tmp_path / "run", adapter_of=base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "run").eval()
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    assert_near(logits_of(theirs), logits_of(model))
    assert_near(logits_of(auto), logits_of(model))
    assert_near(logits_of(theirs.merge_and_unload()), logits_of(model))


@both_families
@pytest.mark.parametrize("num_labels", [1, 10])
def test_peft_reads_our_reward_models(family, num_labels, tmp_path):
    peft = pytest.importorskip("peft")
    base = saved_base(family, tmp_path / "base")
    reward_model = make_reward_model(family, num_labels)
    add_lora_(reward_model.model, RANK, ALPHA)
    randomize_(reward_model.model)
    torch.nn.init.normal_(reward_model.model.score.weight)
    reward_model.save_pretrained(tmp_path / "run", adapter_of=base)
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "run", num_labels=num_labels
    ).eval()
    for prompt, completion in zip(PROMPTS, COMPLETIONS):
        row = reward_model.encode(prompt, completion)
        with torch.no_grad():
            assert_near(theirs(input_ids=torch.tensor([row])).logits, reward_model.logits([row]))


@both_families
def test_we_read_pefts_policies(family, tmp_path):
    peft = pytest.importorskip("peft")
    base = saved_base(family, tmp_path / "base")
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=LAYERS[family][:2],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    theirs.save_pretrained(tmp_path / "run")
    TOKENIZER.save_pretrained(tmp_path / "run")
    assert not torch.equal(logits_of(theirs), logits_of(make_model(family)))
    assert_near(logits_of(load_policy(str(tmp_path / "run"))[0]), logits_of(theirs))


@both_families
def test_we_read_pefts_reward_models(family, tmp_path):
    peft = pytest.importorskip("peft")
    reward_model = make_reward_model(family, num_labels=4)
    base = saved_base(family, tmp_path / "base")
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=LAYERS[family][:2],
        init_lora_weights=False,
        task_type="SEQ_CLS",
    )
    theirs = peft.get_peft_model(reward_model.model, config, "default").eval()
    theirs.peft_config["default"].base_model_name_or_path = base
    theirs.save_pretrained(tmp_path / "run")
    TOKENIZER.save_pretrained(tmp_path / "run")
    row = [1, 5, 6, 9, 8, 2]
    loaded = RewardModel.from_pretrained(str(tmp_path / "run"))
    assert_near(loaded.logits([row]), theirs(input_ids=torch.tensor([row])).logits.detach())


# --- a run


def run(tmp_path, monkeypatch, family, **flags):
    """Two steps of train_policy.train on a reward that counts good words.

    Returns:
        the policy, what each step drew, A and B before and after each step, the anchor after each
        step, and the rows of metrics.jsonl.
    """
    sizes = dict(steps=2, batch_size=6, micro_batch_size=4, max_new_tokens=6, eval_every=2)
    rates = dict(lr=3e-2, warmup_steps=0, lora_rank=RANK, lora_alpha=ALPHA)
    config = train_policy.resolve(train_policy.Config(**sizes, **rates, **flags))
    policy = make_model(family).requires_grad_(False)
    add_lora_(policy, config.lora_rank, config.lora_alpha)
    prompts = [TokenizedPrompt(encode_prompt(TOKENIZER, text)) for text in PROMPTS]

    def score(_, completions):
        return [float(len(c.split()) + ("good" in c)) for c in completions]

    start, reward = AdapterView(policy, None), RewardFunction("good", score)
    task = Task(start, TOKENIZER, reward, prompts, prompts[:2], None, [2], {})
    rollouts, steps, anchors = [], [[p.detach().clone() for p in adapter_parameters(policy)]], []
    real_generate, real_step, real_ema = rollout.generate, torch.optim.AdamW.step, merge.ema_update_

    def generate(model, ids, mask, **options):
        rollouts.append((ids, mask, real_generate(model, ids, mask, **options)))
        return rollouts[-1][2]

    def step(optimizer, *args, **options):
        result = real_step(optimizer, *args, **options)
        steps.append([p.detach().clone() for p in adapter_parameters(policy)])
        return result

    def ema_update(ema, theta, mu):
        real_ema(ema, theta, mu)
        anchors.append([weight.clone() for weight in ema])

    monkeypatch.setattr(rollout, "generate", generate)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(merge, "ema_update_", ema_update)
    tmp_path.mkdir(exist_ok=True)
    run = Run(tmp_path, config, torch.device("cpu"), torch.float32)
    train_policy.train(run, task, policy)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return policy, rollouts, steps, anchors, metrics


def kl_by_hand(model, ids, mask, drawn):
    """Mean over sequences of the summed log-ratio of the draws to a plain model."""
    with torch.no_grad():
        logits = completion_logits(model, ids, mask, drawn.tokens, drawn.mask)
    logprobs = token_logprobs(logits, drawn.tokens.masked_fill(~drawn.mask, 0), 1.0)
    difference = drawn.logprobs - logprobs
    return difference.masked_fill(~drawn.mask, 0.0).sum(1).mean().item()


@both_families
def test_a_run_with_the_fixed_anchor(family, tmp_path, monkeypatch):
    policy, rollouts, steps, _, metrics = run(tmp_path, monkeypatch, family)
    first, second = metrics
    assert first["kl_sft"] == pytest.approx(0, abs=1e-5) and first["kl_anchor"] == first["kl_sft"]
    start = make_model(family)
    assert abs(second["kl_sft"]) > 0.01
    assert second["kl_sft"] == pytest.approx(kl_by_hand(start, *rollouts[1]), abs=1e-4)
    assert second["kl_anchor"] == second["kl_sft"]
    assert second["eval_kl_sft"] > 0.01
    state = policy.state_dict()
    frozen = {name.replace(".base.", "."): state[name] for name in state if "lora_" not in name}
    assert_same_tensors(frozen, start.state_dict())
    for name, layer in lora_layers(policy).items():
        assert layer.lora_B.any(), name
    assert all(not torch.equal(a, b) for a, b in zip(steps[0], steps[2]))


def test_a_run_with_an_average_as_anchor(tmp_path, monkeypatch):
    mu, flags = 0.25, {"anchor": "ema", "mu": 0.25}
    policy, rollouts, steps, anchors, metrics = run(tmp_path, monkeypatch, "llama", **flags)
    expected = steps[0]
    for theta, anchor in zip(steps[1:], anchors, strict=True):
        expected = [(1 - mu) * average + mu * weight for average, weight in zip(expected, theta)]
        for got, want in zip(anchor, expected):
            assert_near(got, want, atol=1e-6)
    averaged = dense_copy("llama", with_weights(policy, anchors[0]))
    first, second = metrics
    assert first["kl_sft"] == pytest.approx(0, abs=1e-5)
    assert first["kl_anchor"] == pytest.approx(0, abs=1e-5)
    kl_anchor = kl_by_hand(averaged, *rollouts[1])
    kl_sft = kl_by_hand(make_model("llama"), *rollouts[1])
    assert second["kl_anchor"] == pytest.approx(kl_anchor, abs=1e-4)
    assert second["kl_sft"] == pytest.approx(kl_sft, abs=1e-4)
    assert abs(second["kl_anchor"] - second["kl_sft"]) > 0.01
