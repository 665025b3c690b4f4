"""What is saved is what was trained: end tokens, RoPE and tokenizers as every reader finds them."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import TEMPLATES, likes, model, rows, save, tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3TextConfig,
    GenerationConfig,
    GPTNeoXConfig,
    LlamaConfig,
    ModernBertDecoderConfig,
    Olmo3Config,
    Phi3Config,
    PhiConfig,
)

import train_policy
import train_rm
from minalign.models.folders import atomic_folder
from minalign.models.loading import end_token_ids, load_policy
from minalign.models.lora import add_lora_
from minalign.models.saving import save_policy
from minalign.reward import RewardModel
from minalign.running.errors import UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows("p.jsonl", {"prompt": "what is the {n} film ?"})
    rows("d.jsonl", {"prompt": "What is {n}?", "chosen": "good {n}", "rejected": "bad {n}"})
    Path("rules.py").write_text("def short(p, c): return [-len(x) / 10 for x in c]\n")
    yield
    sys.modules.pop("rules", None)


def policy_run(start, *more):
    flags = "--rm rules:short --dataset p.jsonl --steps 1 --batch-size 4 --eval-prompts 4"
    flags += f" --max-new-tokens 8 --device cpu --out r --model {start}"
    train_policy.main([*flags.split(), *more])


def edit(path, change):
    content = json.loads(Path(path).read_text())
    change(content)
    Path(path).write_text(json.dumps(content))


def saved_again(folder, out="out"):
    save_policy(*load_policy(folder), Path(out))
    return json.loads(Path(out, "config.json").read_text())


# --- end tokens ----------------------------------------------------------------------------------


def test_b6_the_saved_policy_stops_where_it_was_trained_to_stop():
    tok = tokenizer()
    start = likes(tok, 3)
    start.config.eos_token_id = start.generation_config.eos_token_id = 1
    save("eosmix", start, tok)
    policy_run("eosmix")
    assert GenerationConfig.from_pretrained("r/model").eos_token_id == [1, 3]
    trained = AutoModelForCausalLM.from_pretrained("r/model")
    ids = torch.tensor([[20, 30, 40]])
    torch.manual_seed(0)
    drawn = trained.generate(ids, do_sample=True, top_k=0, max_new_tokens=64, pad_token_id=0)[0, 3:]
    assert 3 in drawn and drawn.tolist().index(3) == len(drawn) - 1


# The tokenizer's, the generation config's and the config's end tokens, the template, all of them
ENDS = [
    (1, 1, 1, "plain", [1]),
    (3, 1, 1, "plain", [1, 3]),
    (1, [1, 2], 1, "plain", [1, 2]),
    (1, 1, [1, 2], "plain", [1, 2]),  # in the config alone
    (1, None, 2, "plain", [1, 2]),
    (1, 1, 100, "plain", [1]),  # a default of the family, here a word like others
    (1, 1, 1, "chatml", [1, 3]),  # the end of turn, before a line break
    (1, 1, 1, "nocue", [1, 3]),
    (1, 1, 1, "think", [1, 3]),
    (1, 1, 1, "parts", [1, 3]),  # content in parts
    (1, 1, 1, "strict", [1, 3]),
    (1, 1, 1, "answers end with nothing", [1]),
    (1, 1, 1, "answers end with words", [1]),
    (1, 1, 1, "a cue without end", [1, 2]),
    (1, 1, 1, "no answers", [1]),
    (1, 1, 1, "refuses all", [1]),
    (1, 1, 1, "two ends", [1, 3]),
]
MORE = {
    "answers end with nothing": "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}",
    "answers end with words": "{% for m in messages %}<|im_start|>{{ m.content }} X\n{% endfor %}",
    "a cue without end": "{% for m in messages %}\n{{ m.content }}\n{% endfor %}<|im_start|>",
    "no answers": "{{ messages[0].content }}<|im_end|>",
    "refuses all": "{{ raise_exception('no') }}",
    "two ends": TEMPLATES["chatml"] + "<|endoftext|>",
}


@pytest.mark.parametrize("of_tokenizer, generation, config, template, ends", ENDS)
def test_b6_every_end_token_is_trained_with_and_saved(
    of_tokenizer, generation, config, template, ends
):
    tok = tokenizer("plain", eos=["<pad>", "<|endoftext|>", "<|im_start|>"][of_tokenizer % 3])
    if of_tokenizer == 3:
        tok = tokenizer("plain")
    tok.chat_template = TEMPLATES.get(template, MORE.get(template))
    save("start", model(tok, eos_token_id=1), tok)
    edit("start/config.json", lambda content: content.update(eos_token_id=config))
    edit("start/generation_config.json", lambda content: content.update(eos_token_id=generation))
    if generation is None:
        os.remove("start/generation_config.json")
    policy, loaded = load_policy("start")
    assert end_token_ids(policy, loaded) == ends
    save_policy(policy, loaded, Path("out"))
    found = GenerationConfig.from_pretrained("out").eos_token_id
    assert (found if isinstance(found, list) else [found]) == ends
    again = load_policy("out")
    assert end_token_ids(*again) == ends  # and so a second run ends there, too


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 0.9, "top_p": 0.6},  # vicuna, Llama-2-chat
        {"do_sample": True, "temperature": 0.6, "top_k": 20},
        {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
        {"do_sample": False, "top_k": 5, "typical_p": 0.3, "min_p": 0.1},
        {"max_length": 77, "repetition_penalty": 1.2},
    ],
)
def test_b10_settings_that_transformers_refuses_to_save_are_kept(settings):
    """Versions before 5.21 did refuse, after the last step; a changed config any version does."""
    tok = tokenizer()
    save("start", model(tok), tok)
    edit("start/generation_config.json", lambda c: c.update(settings, eos_token_id=1))
    saved_again("start")
    found = json.loads(Path("out/generation_config.json").read_text())
    assert found["eos_token_id"] == [1, 3] and "_from_model_config" not in found
    generation = GenerationConfig.from_pretrained("out")
    assert {name: getattr(generation, name) for name in settings} == settings


@pytest.mark.parametrize("script", ["policy", "rm"])
@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_b10_what_cannot_be_saved_fails_before_the_first_step(script, what, monkeypatch):
    tok = tokenizer()
    save("start", model(tok), tok)

    def refuse(*args, **kwargs):
        raise ValueError("is invalid\nand more")

    owner = transformers.PreTrainedConfig if what == "config" else transformers.TokenizersBackend
    monkeypatch.setattr(owner, "save_pretrained", refuse)
    with pytest.raises(UserError, match="start: .*not saved .is invalid."):
        if script == "policy":
            policy_run("start")
        else:
            flags = "--model start --dataset d.jsonl --steps 1 --device cpu --out r"
            train_rm.main(flags.split())
    assert not Path("r/metrics.jsonl").exists() and not Path("r/model").exists()


# --- what transformers 4 reads -------------------------------------------------------------------

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
SMALL |= dict(num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, eos_token_id=3)
SMALL |= dict(bos_token_id=1)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
LONG = dict(rope_type="longrope", short_factor=[1.1] * 4, long_factor=[3.0] * 4)


def layered(full, local):
    return {"full_attention": full, "sliding_attention": {"rope_type": "default"} | local}


# config class, rope_parameters, and the keys in which transformers 4.57 looks for the same
ROPES = [
    (LlamaConfig, dict(rope_theta=1e5, rope_type="default"), dict(rope_theta=1e5)),
    (LlamaConfig, dict(rope_theta=5e5, **LLAMA3), dict(rope_theta=5e5, rope_scaling=LLAMA3)),
    (LlamaConfig, dict(rope_theta=1e6, **YARN), dict(rope_theta=1e6, rope_scaling=YARN)),
    (
        LlamaConfig,
        dict(rope_theta=1e4, rope_type="linear", factor=4.0),
        dict(rope_theta=1e4, rope_scaling=dict(rope_type="linear", factor=4.0)),
    ),
    (
        LlamaConfig,
        dict(rope_theta=1e4, rope_type="dynamic", factor=4.0),
        dict(rope_scaling=dict(rope_type="dynamic", factor=4.0)),
    ),
    (
        Phi3Config,
        dict(rope_theta=1e5, **LONG),
        dict(rope_theta=1e5, original_max_position_embeddings=32),
    ),
    (
        PhiConfig,
        dict(rope_theta=1e5, rope_type="default", partial_rotary_factor=0.25),
        dict(rope_theta=1e5, partial_rotary_factor=0.25),
    ),
    (
        GPTNeoXConfig,
        dict(rope_theta=1e5, rope_type="default", partial_rotary_factor=0.5),
        dict(rotary_emb_base=1e5, rotary_pct=0.5),
    ),
    (
        Gemma3TextConfig,
        layered(dict(rope_theta=1e6, rope_type="linear", factor=8.0), dict(rope_theta=777.0)),
        dict(
            rope_theta=1e6,
            rope_local_base_freq=777.0,
            rope_scaling=dict(rope_type="linear", factor=8.0),
        ),
    ),
    (
        Olmo3Config,
        layered(dict(rope_theta=5e5, **YARN), dict(rope_theta=5e5)),
        dict(rope_theta=5e5, rope_scaling=YARN),
    ),
    (
        ModernBertDecoderConfig,
        layered(dict(rope_theta=1e5, rope_type="default"), dict(rope_theta=777.0)),
        dict(),
    ),
]


@pytest.mark.parametrize("kind, rope, keys", ROPES)
def test_t_b_rope_is_where_transformers_4_looks_and_5_reads_the_same(kind, rope, keys):
    torch.manual_seed(0)
    own = {name: value for name, value in SMALL.items() if name in kind().to_dict()}
    own |= {"original_max_position_embeddings": 32} if kind is Phi3Config else {}
    start = AutoModelForCausalLM.from_config(kind(**own, rope_parameters=rope)).eval()
    start.save_pretrained("start")
    tokenizer().save_pretrained("start")
    before = AutoModelForCausalLM.from_pretrained("start")
    if {"full_attention", "rope_theta"} <= before.config.rope_parameters.keys():
        pytest.skip("this transformers knows one rope for all layers of the family")
    save_policy(before, tokenizer(), Path("out"))
    config = json.loads(Path("out/config.json").read_text())
    assert {key: config.get(key) for key in keys} == keys
    assert "rope_scaling" in keys or kind is Phi3Config or "rope_scaling" not in config
    after = AutoModelForCausalLM.from_pretrained("out")
    after.config.rope_parameters.pop("type", None)  # of phi3, beside rope_type
    assert after.config.rope_parameters == before.config.rope_parameters
    ids = torch.arange(40)[None] % 60 + 3
    assert torch.equal(after(ids).logits, before(ids).logits)


def test_t_b_parts_of_composite_configs_have_their_own_rope():
    text = Gemma3TextConfig(
        **SMALL, rope_parameters=layered({"rope_theta": 1e5}, {"rope_theta": 7.0})
    )
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=28, patch_size=14)
    whole = transformers.Gemma3Config(text_config=text, vision_config=vision)
    start = AutoModelForCausalLM.from_config(whole)
    save_policy(start, tokenizer(), Path("out"))
    config = json.loads(Path("out/config.json").read_text())["text_config"]
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e5, 7.0)
    assert AutoConfig.from_pretrained("out").text_config.rope_parameters == text.rope_parameters


def theta_start():
    tok = tokenizer("chatml")
    rope = {"rope_theta": 1e5, "rope_type": "default"}
    save("start", model(tok, rope_parameters=rope), tok)


@pytest.mark.parametrize("script", ["policy", "policy --lora", "rm", "rm --lora"])
def test_t_b_every_run_saves_rope_theta_and_a_class_of_tokenizer_that_others_know(script):
    theta_start()
    lora = ["--lora-rank", "2"] if "--lora" in script else []
    if script.startswith("policy"):
        policy_run("start", *lora)
    else:
        flags = "--model start --dataset d.jsonl --steps 1 --device cpu --out r"
        train_rm.main([*flags.split(), *lora])
    assert json.loads(Path("r/model/config.json").read_text())["rope_theta"] == 1e5
    config = json.loads(Path("r/model/tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_t_b_special_tokens_of_ones_own_are_listed_where_transformers_4_looks():
    """There extra_special_tokens is a dict, and a list ends in an AttributeError."""
    tok = tokenizer("chatml")
    tok.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<new>"]})
    start = model(tok)
    save("start", start, tok)
    saved_again("start")
    config = json.loads(Path("out/tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == ["<|im_start|>", "<new>"]
    assert "extra_special_tokens" not in config
    again = AutoTokenizer.from_pretrained("out")
    assert again.get_vocab() == tok.get_vocab() and again.chat_template == tok.chat_template
    assert again.all_special_tokens == tok.all_special_tokens
    text = "what <new><|im_start|> film"
    assert again(text)["input_ids"] == tok(text)["input_ids"]


def test_t_b_the_saved_reward_model_has_the_same_logits():
    tok = tokenizer("chatml")
    save("rm", model(tok, "rm", rope_parameters={"rope_theta": 1e5, "rope_type": "default"}), tok)
    RewardModel.from_pretrained("rm").save_pretrained("out")
    assert json.loads(Path("out/config.json").read_text())["rope_theta"] == 1e5
    assert not Path("out/generation_config.json").exists()
    ids = torch.arange(4, 30)[None]
    one, two = (AutoModelForSequenceClassification.from_pretrained(f) for f in ("rm", "out"))
    assert torch.equal(one(ids).logits, two(ids).logits)


def test_t_b_the_number_of_experts_is_where_transformers_4_looks():
    """Qwen3-MoE's is written as num_local_experts, and 128 were read."""
    own = SMALL | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
    start = AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**own))
    save_policy(start, tokenizer(), Path("out"))
    assert json.loads(Path("out/config.json").read_text())["num_experts"] == 4
    assert AutoConfig.from_pretrained("out").num_experts == 4


# --- adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base, script",
    [("start", "policy"), ("start", "rm"), ("inner/../start", "policy"), ("run", "policy")],
)
def test_b20_adapters_name_a_base_that_is_found_from_anywhere(base, script, monkeypatch):
    theta_start()
    os.makedirs("inner")
    os.makedirs("run")
    shutil.copytree("start", "run/model")
    if script == "policy":
        policy_run(base, "--lora-rank", "2", "--lora-save", "adapter")
    else:
        flags = f"--model {base} --dataset d.jsonl --steps 1 --device cpu --out r --lora-rank 2"
        train_rm.main([*flags.split(), "--lora-save", "adapter"])
    named = json.loads(Path("r/model/adapter_config.json").read_text())["base_model_name_or_path"]
    assert os.path.isabs(named) and os.path.samefile(
        named, "run/model" if base == "run" else "start"
    )
    config = json.loads(Path("r/model/tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    monkeypatch.chdir("inner")
    load = load_policy if script == "policy" else RewardModel.from_pretrained
    load("../r")


def test_b20_a_hub_id_stays_as_it_is():
    tok = tokenizer()
    policy = model(tok)
    add_lora_(policy, 2)
    save_policy(policy, tok, Path("out"), adapter_of="some/model")
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model"


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize(
    "error",
    [OSError("full"), ValueError("x"), KeyboardInterrupt(), UserError("y"), AttributeError()],
)
def test_b26_nothing_is_left_behind_after_any_failed_save(error, existed):
    if existed:
        os.makedirs("o/model")
        Path("o/model/kept").touch()
    with pytest.raises((type(error), UserError)) as found, atomic_folder(Path("o/model")) as new:
        Path(new, "half").touch()
        raise error
    assert isinstance(error, OSError) == ("make room" in str(found.value))
    assert sorted(os.listdir("o")) == ["model"] * existed
    assert not existed or os.listdir("o/model") == ["kept"]


def test_b26_a_save_that_is_stopped_between_two_renames_leaves_what_was_there(monkeypatch):
    os.makedirs("o/model")
    Path("o/model/kept").touch()
    rename = Path.rename

    def stopped(path, target):
        if path.name == "model.new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt), atomic_folder(Path("o/model")):
        pass
    assert os.listdir("o") == ["model"] and os.listdir("o/model") == ["kept"]


def test_weights_are_those_that_were_trained():
    tok = tokenizer()
    save("start", model(tok, tie_word_embeddings=True), tok)
    saved_again("start")
    one, two = (load_file(f"{folder}/model.safetensors") for folder in ("start", "out"))
    assert one.keys() == two.keys() and all(torch.equal(t, two[name]) for name, t in one.items())
