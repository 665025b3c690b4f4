"""Runs of the three scripts that take a second: for the tests of --resume, and experiments/kill.py.

Everything is at the top level of a module, so that a forkserver's children can import it.
"""

import contextlib
import copy
import dataclasses
import json
import os
import random
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import minalign.data
import train_policy
import train_rm
import warp
from minalign import toy
from minalign.chat import TokenizedPrompt, encode_prompt
from minalign.common import one_line_errors, stop_after_step
from minalign.lora import AdapterView, add_lora_
from minalign.rewards import RewardFunction
from minalign.task import Task

CPU = torch.device("cpu")


def tiny_model():
    """A toy tokenizer and a Llama of 4 thousand parameters."""
    tokenizer = toy.make_tokenizer()
    torch.manual_seed(3)
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, tie_word_embeddings=True, **sizes, **ids)
    )
    return model.eval().requires_grad_(False), tokenizer


def reward(prompts, completions):
    """Something that depends on every word."""
    return [sum(len(word) % 5 for word in (p + c).split()) / 7 for p, c in zip(prompts, completions)]


def tiny_task(function=reward):
    model, tokenizer = tiny_model()
    rng = random.Random(0)
    rows = [TokenizedPrompt(encode_prompt(tokenizer, toy.write_prompt(rng))) for _ in range(11)]
    eos = [tokenizer.eos_token_id]
    return Task(model, tokenizer, RewardFunction("tiny", function), rows, rows[:3], (2, 6), eos, {})


def policy_config(**changes):
    given = dict(dataset="-", model="-", rm=["-"], steps=6, batch_size=4, group_size=2, lr=1e-2, warmup_steps=3, beta=0.05,
                 max_new_tokens=6, eval_prompts=3, eval_every=4, save_every=1, keep=2, seed=5, device="cpu")  # fmt: skip
    return train_policy.resolve(train_policy.Config(**(given | changes)))


def run_policy(out, stop=None, function=reward, dtype=torch.float32, **changes):
    """train_policy.train in `out`; the policy that it leaves."""
    config, task = policy_config(**changes), tiny_task(function)
    out = Path(out)
    out.mkdir(exist_ok=True)
    policy = copy.deepcopy(task.start).requires_grad_(True)
    if config.lora_rank:
        policy = task.start
        torch.manual_seed(config.seed)
        add_lora_(policy, config.lora_rank, config.lora_alpha, targets=config.lora_targets)
        task = task._replace(start=AdapterView(policy, None))
    train_policy.train(config, task, policy, out, dtype, stop)
    return policy


def start_model_folder(folder):
    """A tiny model in a folder, for train_rm."""
    if not Path(folder).exists():
        for part in tiny_model():
            part.save_pretrained(folder)
    return str(folder)


def tiny_pairs(*_, **__):
    rng = random.Random(1)
    pairs = [toy._compare(rng, toy.write_prompt(rng), 1.0) for _ in range(40)]
    return pairs[:30], pairs[30:]


def run_rm(out, model, stop=None, **changes):
    """train_rm.train in `out` on forty pairs."""
    given = dict(
        dataset="-", model=model, steps=6, batch_size=4, lr=1e-2, eval_every=4, save_every=1, keep=2, seed=5, device="cpu"
    )
    config = train_rm.resolve(train_rm.Config(**(given | changes)))
    Path(out).mkdir(exist_ok=True)
    real, minalign.data.load_pairs = minalign.data.load_pairs, tiny_pairs
    try:
        return train_rm.train(config, Path(out), CPU, torch.float32, stop)
    finally:
        minalign.data.load_pairs = real


def warp_config(**changes):
    given = dataclasses.asdict(policy_config()) | dict(
        steps=3, eval_every=3, anchor="ema", mu=0.3, iterations=2, runs=2, etas="0,0.5,1", keep_etas="0.5"
    )
    return warp.resolve(warp.Config(**(given | changes)))


def run_warp(out, stop=None, function=reward, **changes):
    Path(out).mkdir(exist_ok=True)
    return warp.run_warp(warp_config(**changes), tiny_task(function), Path(out), torch.float32, stop)


SCRIPTS = {
    "train_policy": lambda out, model, **changes: run_policy(out, anchor="ema", mu=0.1, steps=12, **changes),
    "train_rm": lambda out, model, **changes: run_rm(out, model, steps=12, lora_rank=2, lora_dropout=0.3, **changes),
    "warp": lambda out, model, **changes: run_warp(out, **changes),
}


def child(script, out, model, **changes):
    """One of SCRIPTS in a process of its own, quietly."""
    torch.set_num_threads(1)
    with open(f"{out}.log", "a") as log, open(os.devnull, "w") as bar:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(bar):
            SCRIPTS[script](out, model, **changes)


def content(out):
    """What a run left, without what may differ (times): path -> text, rows or tensors."""
    found = {}
    for path in sorted(p for p in Path(out).rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]
        elif path.name == "state.pt":
            found[name] = torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("argv", "resume")}
        else:
            found[name] = path.read_bytes()
    return found


def difference(a, b, where="", tolerance=0.0):
    """Where two nested contents differ first, in words; "" where they are one."""
    if type(a) is not type(b):
        return f"{where}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, torch.Tensor):
        same = a.shape == b.shape and (torch.equal(a, b) or bool(tolerance and torch.allclose(a, b, 0, tolerance)))
        return (
            "" if same else f"{where}: tensors differ by {(a.double() - b.double()).abs().max() if a.shape == b.shape else ''}"
        )
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where}: {sorted(map(str, a.keys() ^ b.keys()))} in one alone"
        a, b, names = a.values(), b.values(), list(a)
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} items"
        names = range(len(a))
    else:
        same = a == b or (tolerance and isinstance(a, float) and abs(a - b) <= tolerance * max(1, abs(a)))
        return "" if same else f"{where}: {a!r:.200} and {b!r:.200}"
    return next(filter(None, (difference(x, y, f"{where}/{name}", tolerance) for x, y, name in zip(a, b, names))), "")


def kill_and_resume(context, script, out, model, kills, rng, seconds):
    """SIGKILL a run `kills` times at random instants, start it again each time, let it end; the instants in seconds.

    `seconds` is what an undisturbed run takes. A run that ended before its kill is not counted.
    """
    instants, changes = [], {}
    while True:
        process = context.Process(target=child, args=(script, str(out), model), kwargs=changes)
        process.start()
        changes = {"resume": True}
        if len(instants) < kills:
            instant = rng.uniform(0, seconds / kills * 1.5)
            process.join(instant)
        else:
            process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
            assert len(instants) < kills, f"{script}: does not end"
            instants.append(round(instant, 3))
        elif process.exitcode != 0:
            sys.exit(f"{script}: exit status {process.exitcode} after {len(instants)} kills, see {out}.log")
        else:
            return instants


def full_disk(script, out, model):
    """A run that goes on where no file may grow beyond 20 kB, as __main__ runs it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with open(f"{out}.err", "w") as errors, contextlib.redirect_stderr(errors), one_line_errors():
        child(script, out, model, resume=True, save_every=2)


def stuck(out):
    """A step that does not end."""
    with open(f"{out}/err", "w") as errors, contextlib.redirect_stderr(errors), one_line_errors(), stop_after_step(Path(out)):
        Path(out, "started").touch()
        time.sleep(60)
