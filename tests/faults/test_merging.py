"""The merge accepts what training accepts, names what it cannot merge, and rounds nothing away."""

import copy
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TEMPLATES, model, save, tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from minalign.running.errors import UserError
from minalign.tools.merge import main as merge_main


def moved(start, seed, by=1e-3):
    """A policy that began at `start`."""
    torch.manual_seed(seed)
    policy = copy.deepcopy(start).float()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += by * torch.randn_like(parameter)
    return policy


@pytest.fixture
def world(tmp_path, monkeypatch):
    """init, A and B in the working folder, as transformers saves them."""
    monkeypatch.chdir(tmp_path)
    tok = tokenizer("chatml")
    start = model(tok, tie_word_embeddings=True)
    save("init", start, tok)
    for seed, name in enumerate("AB", 1):
        save(name, moved(start, seed), tok)
    return tmp_path


def merge(*more, init="init", models=("A", "B"), out="m"):
    merge_main(["--init", init, "--models", *models, "--out", out, *more])
    return load_file(f"{out}/model.safetensors")


def weights(folder):
    """What transformers reads, float64."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor.double() for name, tensor in loaded.state_dict().items()}


def edit(path, change):
    content = json.loads(open(path).read())
    change(content)
    with open(path, "w") as file:
        json.dump(content, file)


def tensors_of(folder, change):
    """Rewrite a folder's tensors."""
    state = load_file(f"{folder}/model.safetensors")
    save_file(change(state) or state, f"{folder}/model.safetensors", {"format": "pt"})


# --- layouts -------------------------------------------------------------------------------------


def as_saved(folder):
    pass


def old_merges(folder):
    def change(content):
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        content["model"].pop("ignore_merges", None)

    edit(f"{folder}/tokenizer.json", change)


def vocab_json(folder):
    old_merges(folder)
    bpe = json.load(open(f"{folder}/tokenizer.json"))["model"]
    json.dump(bpe["vocab"], open(f"{folder}/vocab.json", "w"))
    open(f"{folder}/merges.txt", "w").write("\n".join(["#version: 0.2", *bpe["merges"]]) + "\n")


def tied_copy(folder):
    def change(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    tensors_of(folder, change)


def without_prefix(folder):
    """As GPT-2's hub folder: saved from the body alone."""
    tensors_of(folder, lambda state: {name.removeprefix("model."): t for name, t in state.items()})


def pickle(folder, **options):
    torch.save(load_file(f"{folder}/model.safetensors"), f"{folder}/pytorch_model.bin", **options)
    os.remove(f"{folder}/model.safetensors")


def old_pickle(folder):
    pickle(folder, _use_new_zipfile_serialization=False)


def pickle_in_shards(folder):
    state = load_file(f"{folder}/model.safetensors")
    os.remove(f"{folder}/model.safetensors")
    weight_map = {}
    for i, names in enumerate((list(state)[::2], list(state)[1::2])):
        torch.save({name: state[name] for name in names}, f"{folder}/pytorch_model-{i}.bin")
        weight_map |= dict.fromkeys(names, f"pytorch_model-{i}.bin")
    index = {"metadata": {}, "weight_map": weight_map}
    json.dump(index, open(f"{folder}/pytorch_model.bin.index.json", "w"))


def shards(folder):
    whole = AutoModelForCausalLM.from_pretrained(folder)
    os.remove(f"{folder}/model.safetensors")
    whole.save_pretrained(folder, max_shard_size="30KB")


def stale_index(folder):
    """Of shards that were there before; transformers reads the whole file."""
    whole = load_file(f"{folder}/model.safetensors")
    shards(folder)
    for name in os.listdir(folder):
        if name.startswith("model-0"):
            old = load_file(f"{folder}/{name}")
            save_file({k: torch.zeros_like(t) for k, t in old.items()}, f"{folder}/{name}")
    save_file(whole, f"{folder}/model.safetensors", {"format": "pt"})


def index_without_shards(folder):
    stale_index(folder)
    for name in os.listdir(folder):
        if name.startswith("model-0"):
            os.remove(f"{folder}/{name}")


def symlinks(folder):
    """A snapshot in the hub's cache: links to blobs elsewhere."""
    os.makedirs("blobs", exist_ok=True)
    for i, name in enumerate(sorted(os.listdir(folder))):
        shutil.move(f"{folder}/{name}", f"blobs/{folder}-{i}")
        os.symlink(f"../blobs/{folder}-{i}", f"{folder}/{name}")


def a_run(folder):
    shutil.move(folder, "inner")
    os.makedirs(folder)
    shutil.move("inner", f"{folder}/model")


def bfloat16(folder):
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)


def bfloat16_pickle(folder):
    bfloat16(folder)
    pickle(folder)


def adapters(folder):
    """PEFT's files, of a base model that lies beside them."""
    base = f"{folder}-base"
    shutil.move(folder, base)
    os.makedirs(folder)
    torch.manual_seed(5)
    start = weights(base)
    layers = [name.removesuffix(".weight") for name in start if name.endswith("q_proj.weight")]
    low = {}
    for layer in layers:
        d_out, d_in = start[f"{layer}.weight"].shape
        low[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(2, d_in) / 10
        low[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(d_out, 2) / 10
    save_file(low, f"{folder}/adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "bias": "none",
        "r": 2,
        "lora_alpha": 6,
        "task_type": "CAUSAL_LM",
    }
    config |= {"base_model_name_or_path": os.path.abspath(base), "target_modules": ["q_proj"]}
    json.dump(config, open(f"{folder}/adapter_config.json", "w"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(f"{base}/{name}", folder)


def expected_weights(folder):
    if os.path.isdir(f"{folder}/model"):
        folder = f"{folder}/model"
    if not os.path.exists(f"{folder}/adapter_config.json"):
        return weights(folder)
    state = weights(f"{folder}-base")
    low = load_file(f"{folder}/adapter_model.safetensors")
    for name in [name for name in low if "lora_A" in name]:
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        down, up = low[name].double(), low[name.replace("lora_A", "lora_B")].double()
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + 3 * up @ down
    return state


LAYOUTS = [as_saved, old_merges, vocab_json, tied_copy, without_prefix, pickle, old_pickle]
LAYOUTS += [pickle_in_shards, shards, stale_index, index_without_shards, symlinks, a_run, bfloat16]
LAYOUTS += [bfloat16_pickle, adapters]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"T-A-{layout.__name__}")
@pytest.mark.parametrize("place", ["init", "A"])
def test_whatever_training_reads_is_merged(world, layout, place):
    """B1-B3, B20b: by a float64 mean of what transformers reads, moved halfway to the init."""
    layout(place)
    read = [expected_weights(folder) for folder in ("init", "A", "B")]
    merge("--method", "lerp", "--eta", "0.5")
    merged = weights("m")
    assert merged.keys() == read[0].keys()
    for name, tensor in merged.items():
        expected = 0.5 * read[0][name] + 0.25 * (read[1][name] + read[2][name])
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)
    files = set(os.listdir("m"))
    assert "adapter_config.json" not in files and "inputs" not in files
    assert AutoTokenizer.from_pretrained("m").chat_template == TEMPLATES["chatml"]
    assert not os.path.exists("m.new")


def test_t_a_a_hub_id_in_the_cache_is_an_init(world, monkeypatch):
    snapshot = "cache/models--some--model/snapshots/abc"
    shutil.copytree("init", snapshot)
    os.makedirs("cache/models--some--model/refs")
    open("cache/models--some--model/refs/main", "w").write("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(world / "cache"))
    monkeypatch.setattr("transformers.utils.hub.HF_HUB_CACHE", str(world / "cache"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    here, by_id = merge(), merge(init="some/model", out="m2")
    assert all(torch.equal(tensor, by_id[name]) for name, tensor in here.items())


def test_t_a_gpt2_as_on_the_hub_with_masks_and_names_of_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tok = tokenizer()
    sizes = dict(n_embd=16, n_layer=1, n_head=2, n_positions=32, eos_token_id=3, bos_token_id=1)
    torch.manual_seed(0)
    start = GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), **sizes))
    save("init", start, tok)
    for seed, name in enumerate("AB", 1):
        save(name, moved(start, seed), tok)

    def change(state):
        state = {name.removeprefix("transformer."): t for name, t in state.items()}
        state["h.0.attn.bias"] = torch.ones(32, 32).tril()[None, None].clone()
        state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        return state

    tensors_of("init", change)
    vocab_json("init")
    merged = merge("--method", "lerp")
    a, b = (load_file(f"{name}/model.safetensors") for name in "AB")
    assert merged.keys() == a.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2)


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by, method", [(1e-3, "lerp"), (1e-5, "lerp"), (1e-4, "slerp")])
def test_b5_a_bfloat16_init_rounds_nothing_away(tmp_path, monkeypatch, capsys, by, method):
    """M3: relative error of the merged task vector was .93 at 1e-5."""
    monkeypatch.chdir(tmp_path)
    tok = tokenizer()
    start = model(tok, hidden_size=64).bfloat16()
    save("init", start, tok)
    for seed, name in enumerate("AB", 1):
        save(name, moved(start, seed, by), tok)
    merged, init = merge("--method", method), load_file("init/model.safetensors")
    a, b = (load_file(f"{name}/model.safetensors") for name in "AB")
    for name, tensor in merged.items():
        theta = init[name].double()
        deltas = [state[name].double() - theta for state in (a, b)]
        delta, mean = tensor.double() - theta, sum(deltas) / 2
        if method == "slerp":  # by layers: the direction is the mean's
            delta, mean = delta / delta.norm(), mean / mean.norm()
        assert tensor.dtype == torch.float32
        assert (delta - mean).norm() < 0.02 * mean.norm(), name
    assert "float32" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained("m").dtype == torch.float32  # config.json says so


@pytest.mark.parametrize(
    "dtypes, written",
    [
        ("bfloat16 bfloat16 bfloat16", torch.bfloat16),
        ("float16 float16 float16", torch.float16),
        ("float32 bfloat16 bfloat16", torch.float32),
        ("bfloat16 bfloat16 float32", torch.float32),
        ("bfloat16 float16 float16", torch.float32),
        ("float32 float64 float32", torch.float64),
    ],
)
@pytest.mark.parametrize("eta", ["0.5"])
def test_b5_a_merge_has_the_widest_dtype_of_its_models(world, capsys, dtypes, written, eta):
    for folder, dtype in zip(("init", "A", "B"), dtypes.split()):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        loaded.to(getattr(torch, dtype)).save_pretrained(folder)
    states = [load_file(f"{folder}/model.safetensors") for folder in ("init", "A", "B")]
    merged = merge("--method", "lerp", "--eta", eta)
    assert {tensor.dtype for tensor in merged.values()} == {written}
    assert str(written).removeprefix("torch.") in capsys.readouterr().out
    half = 1 - float(eta)
    for name, tensor in merged.items():
        init, a, b = (state[name].double() for state in states)
        expected = half * init + (1 - half) * (a + b) / 2
        close = dict(rtol=1e-2, atol=1e-3) if written.itemsize == 2 else dict(rtol=1e-6, atol=1e-7)
        close = dict(rtol=1e-14, atol=1e-14) if written.itemsize == 8 else close
        torch.testing.assert_close(tensor.double(), expected, **close)


QUANTISED = ["int8", "uint8", "int32", "int64", "float8_e4m3fn", "bool"]

# --- what cannot be merged -----------------------------------------------------------------------


def poison(value):
    def change(state):
        state["model.layers.0.mlp.up_proj.weight"][0, 0] = value

    return change


def retyped(dtype):
    def change(state):
        name = "model.layers.0.mlp.up_proj.weight"
        return state | {name: (30 * state[name]).to(dtype)}

    return change


@pytest.mark.parametrize(
    "place, value, method",
    [
        ("init", float("nan"), "slerp"),
        ("A", float("nan"), "lerp"),
        ("B", float("nan"), "slerp"),
        ("init", float("inf"), "lerp"),
        ("A", float("inf"), "slerp-symmetric"),
        ("B", -float("inf"), "slerp"),
    ],
)
def test_b4_weights_that_are_not_finite_name_model_and_tensor(world, place, value, method):
    tensors_of(place, poison(value))
    with pytest.raises(UserError) as error:
        merge("--method", method)
    said = str(error.value)
    assert "model.layers.0.mlp.up_proj.weight" in said and "finite" in said and "\n" not in said
    assert {"init": "of the init", "A": "of policy 1", "B": "of policy 2"}[place] in said
    assert "policy 2 B" in said and sorted(os.listdir()) == ["A", "B", "init"]


def test_b4_both_models_infinite_at_one_place(world):
    for folder in ("init", "A", "B"):
        tensors_of(folder, poison(float("inf")))
    with pytest.raises(UserError, match="of the init"):
        merge()


@pytest.mark.parametrize(
    "place, dtype", [("init", "int8"), ("A", "int8"), *(("all", t) for t in QUANTISED)]
)
def test_b4_quantised_weights_name_model_and_tensor(world, place, dtype):
    for folder in ("init", "A", "B") if place == "all" else (place,):
        tensors_of(folder, retyped(getattr(torch, dtype)))
    with pytest.raises(UserError, match=r"model.layers.0.mlp.up_proj.weight is \w+") as error:
        merge()
    assert str(error.value).startswith(f"{'init' if place == 'all' else place}: ")
    assert sorted(os.listdir()) == ["A", "B", "init"]


def test_b4_a_mask_that_all_have_is_taken_and_one_that_differs_is_refused(world):
    for folder in ("init", "A", "B"):
        tensors_of(folder, lambda state: state | {"model.mask": torch.ones(3, dtype=torch.bool)})
    assert merge()["model.mask"].all()
    tensors_of("B", lambda state: state | {"model.mask": torch.zeros(3, dtype=torch.bool)})
    with pytest.raises(UserError, match="B: model.mask"):
        merge(out="m2")


def test_t_a_a_real_change_of_ids_is_still_refused(world):
    def change(content):
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    edit("B/tokenizer.json", change)
    with pytest.raises(UserError, match="B: its tokenizer has another vocabulary than init's"):
        merge()


def test_t_a_an_added_token_is_refused_and_another_padding_is_not(world):
    tok = AutoTokenizer.from_pretrained("A")
    tok.padding_side = "left"
    tok.save_pretrained("A")
    merge()
    tok.add_tokens(["new"])
    tok.save_pretrained("A")
    with pytest.raises(UserError, match="A: its tokenizer"):
        merge(out="m2")


@pytest.mark.parametrize("where", ["../secret", "ABSOLUTE", "inner/../../secret"])
@pytest.mark.parametrize("place", ["init", "A"])
def test_s13_an_index_that_leads_out_of_its_folder_is_refused(world, where, place):
    shutil.copytree(place, "secret")
    os.makedirs(f"{place}/inner")
    names = list(load_file(f"{place}/model.safetensors"))
    os.remove(f"{place}/model.safetensors")
    where = where.replace("ABSOLUTE", str(world / "secret")) + "/model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, where)}
    json.dump(index, open(f"{place}/model.safetensors.index.json", "w"))
    with pytest.raises(UserError, match="outside of the folder"):
        merge()
    assert not os.path.exists("m")


def broken_index(content):
    def break_(folder):
        shards(folder)
        edit(f"{folder}/model.safetensors.index.json", lambda index: index.update(content))

    return break_


def a_lost_tensor(folder):
    broken_index({})(folder)
    index = json.load(open(f"{folder}/model.safetensors.index.json"))
    index["weight_map"]["model.layers.9.weight"] = next(iter(index["weight_map"].values()))
    json.dump(index, open(f"{folder}/model.safetensors.index.json", "w"))


def written(file, text):
    def break_(folder):
        open(f"{folder}/{file}", "w").write(text)

    return break_


def cut(folder):
    content = open(f"{folder}/model.safetensors", "rb").read()
    open(f"{folder}/model.safetensors", "wb").write(content[: len(content) // 2])


BROKEN = {
    "weight_map a list": broken_index({"weight_map": [1]}),
    "weight_map null": broken_index({"weight_map": None}),
    "weight_map a text": broken_index({"weight_map": "model.safetensors"}),
    "weight_map of numbers": broken_index({"weight_map": {"a": 5}}),
    "weight_map empty": broken_index({"weight_map": {}}),
    "weight_map of a file that is not there": broken_index({"weight_map": {"a": "b.safetensors"}}),
    "weight_map with a missing tensor": a_lost_tensor,
    "tokenizer.json {": written("tokenizer.json", "{"),
    "tokenizer.json []": written("tokenizer.json", "[]"),
    "tokenizer.json null": written("tokenizer.json", "null"),
    "config.json []": written("config.json", "[]"),
    "config.json null": written("config.json", "null"),
    "generation_config.json {": written("generation_config.json", "{"),
    "generation_config.json []": written("generation_config.json", "[]"),
    "half a file": cut,
    "an empty file": written("model.safetensors", ""),
    "no file": lambda folder: os.remove(f"{folder}/model.safetensors"),
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda name: f"S14-{name}")
def test_broken_folders_are_one_line_that_names_them(world, broken):
    place = ("init", "B")[list(BROKEN).index(broken) % 2]
    BROKEN[broken](place)
    with pytest.raises(UserError) as error:
        merge()
    said = str(error.value)
    assert place in said.split(":")[0] and "\n" not in said and len(said) < 400
    assert "cannot be written" not in said and "make room" not in said
    assert sorted(os.listdir()) == ["A", "B", "init"]


@pytest.mark.parametrize("lam", ["50", "-1", "1.01", "nan"])
def test_b26_lam_lies_between_the_two(world, lam, capsys):
    with pytest.raises((UserError, SystemExit)):
        merge("--lam", lam)
    assert not os.path.exists("m")
    merge("--lam", "0.3")


# --- what comes along ----------------------------------------------------------------------------


def test_b6_every_end_token_of_the_models_is_listed(world):
    for folder, ends in (("init", 1), ("A", [1, 3]), ("B", [2])):
        edit(
            f"{folder}/generation_config.json",
            lambda content, e=ends: content.update(eos_token_id=e),
        )
    edit(
        "init/generation_config.json",
        lambda content: content.update(temperature=0.6, do_sample=True),
    )
    merge()
    merged = GenerationConfig.from_pretrained("m")
    assert sorted(merged.eos_token_id) == [1, 2, 3] and merged.temperature == 0.6
    os.remove("init/generation_config.json")
    merge(out="m2")
    merged = GenerationConfig.from_pretrained("m2")
    assert sorted(merged.eos_token_id) == [1, 2, 3] and merged.pad_token_id == 0


def test_every_chat_template_comes_along(world):
    tok = AutoTokenizer.from_pretrained("init")
    tok.chat_template = {"default": TEMPLATES["chatml"], "tool_use": TEMPLATES["nocue"]}
    for folder in ("init", "A", "B"):
        tok.save_pretrained(folder)
    merge()
    assert AutoTokenizer.from_pretrained("m").chat_template == tok.chat_template


def test_t_b_a_merge_of_what_transformers_5_saved_reads_alike_in_transformers_4(world):
    for folder in ("init", "A", "B"):
        edit(f"{folder}/config.json", lambda c: c["rope_parameters"].update(rope_theta=1e5))
    merge()
    assert json.load(open("m/config.json"))["rope_theta"] == 1e5
    config = json.load(open("m/tokenizer_config.json"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoModelForCausalLM.from_pretrained("m").config.rope_parameters["rope_theta"] == 1e5


# --- where the merge meets reward models, copies and settings ------------------------------------


@pytest.mark.parametrize("layout", [as_saved, pickle, pickle_in_shards, old_merges])
@pytest.mark.parametrize("place", ["init", "A"])
def test_t_a_reward_models_are_merged_from_every_layout(world, layout, place):
    tok = tokenizer("chatml")
    start = model(tok, "rm")
    for seed, name in enumerate(("init", "A", "B")):
        shutil.rmtree(name)
        save(name, moved(start, seed, by=1e-3 * bool(seed)), tok)
    a, b = (load_file(f"{name}/model.safetensors") for name in "AB")
    layout(place)
    merged = merge("--method", "lerp")
    assert merged.keys() == a.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2)


def test_t_a_a_policy_and_a_reward_model_are_not_merged(world):
    save("R", model(tokenizer("chatml"), "rm"), tokenizer("chatml"))
    for models in (["A", "R"], ["R", "R"]):
        with pytest.raises(UserError, match="--models R: weights missing: lm_head.weight"):
            merge(models=models)


def test_b3_a_tied_copy_that_all_models_have_is_merged_once(world):
    alone = merge()
    for folder in ("init", "A", "B"):
        tied_copy(folder)
    merged = merge(out="m2")
    assert merged.keys() == alone.keys()
    assert all(torch.equal(tensor, alone[name]) for name, tensor in merged.items())


def test_settings_in_which_a_policy_differs_from_the_init_are_named(world, capsys):
    """What its weights mean is not theirs alone: heads, RoPE, epsilon."""
    merge()
    assert "note:" not in capsys.readouterr().out
    rope = {"rope_type": "default", "rope_theta": 1e6}
    edit("B/config.json", lambda c: c.update(num_attention_heads=8, rope_parameters=rope))
    merge(out="m2")
    assert "note: B: another num_attention_heads, rope_param" in capsys.readouterr().out


def test_b4_an_init_whose_config_says_quantised_is_refused(world):
    """The merge would have copied a config that nothing loads."""
    edit("init/config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"}))
    with pytest.raises(UserError, match="init: cannot be loaded: quantised"):
        merge()


@pytest.mark.parametrize("place", ["init", "A"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_folder_without_a_file_says_which(world, place, file):
    """A-H8: a message that ended in a colon."""
    os.remove(f"{place}/{file}")
    with pytest.raises(UserError, match=f"{place}: .*no {file} in {place}$"):
        merge()
