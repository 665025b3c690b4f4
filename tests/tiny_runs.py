"""Runs of the three scripts that take a second, for the tests of --resume and experiments/kill.py.

All functions are at the top level of the module, so that a forkserver's children can import them.
"""

import contextlib
import copy
import dataclasses
import json
import os
import random
import resource
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import train_policy
import train_rm
import warp
from minalign.data import pairs, toy
from minalign.data.chat import TokenizedPrompt, encode_prompt
from minalign.models.lora import AdapterView, add_lora_
from minalign.models.rewards import RewardFunction
from minalign.running.errors import one_line_errors
from minalign.running.run import Run, stop_after_step
from minalign.task import Task

CPU = torch.device("cpu")


def tiny_model():
    """A toy tokenizer and a Llama of 4 thousand parameters."""
    tokenizer = toy.make_tokenizer()
    torch.manual_seed(3)
    ids = dict(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    sizes = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **sizes,
        **ids,
    )
    model = LlamaForCausalLM(config)
    return model.eval().requires_grad_(False), tokenizer


def reward(prompts, completions):
    """Something that depends on every word."""
    texts = [prompt + completion for prompt, completion in zip(prompts, completions)]
    return [sum(len(word) % 5 for word in text.split()) / 7 for text in texts]


def tiny_task(function=reward):
    model, tokenizer = tiny_model()
    rng = random.Random(0)
    rows = [TokenizedPrompt(encode_prompt(tokenizer, toy.write_prompt(rng))) for _ in range(11)]
    eos = [tokenizer.eos_token_id]
    return Task(model, tokenizer, RewardFunction("tiny", function), rows, rows[:3], (2, 6), eos, {})


def new_run(out, config, dtype, stop=None):
    """A Run in the folder `out`, without a script around it."""
    Path(out).mkdir(exist_ok=True)
    return Run(Path(out), config, CPU, dtype, stop=stop or threading.Event())


def policy_config(**changes):
    given = dict(
        dataset="-",
        model="-",
        rm=["-"],
        steps=6,
        batch_size=4,
        group_size=2,
        lr=1e-2,
        warmup_steps=3,
        beta=0.05,
        max_new_tokens=6,
        eval_prompts=3,
        eval_every=4,
        save_every=1,
        keep=2,
        seed=5,
        device="cpu",
    )
    return train_policy.resolve(train_policy.Config(**(given | changes)))


def run_policy(out, stop=None, function=reward, dtype=torch.float32, **changes):
    """train_policy.train in the folder `out`. Returns the policy that it leaves."""
    config, task = policy_config(**changes), tiny_task(function)
    policy = copy.deepcopy(task.start).requires_grad_(True)
    if config.lora_rank:
        policy = task.start
        torch.manual_seed(config.seed)
        add_lora_(policy, config.lora_rank, config.lora_alpha, targets=config.lora_targets)
        task = task._replace(start=AdapterView(policy, None))
    train_policy.train(new_run(out, config, dtype, stop), task, policy)
    return policy


def start_model_folder(folder):
    """A tiny model in a folder, for train_rm."""
    if not Path(folder).exists():
        for part in tiny_model():
            part.save_pretrained(folder)
    return str(folder)


def tiny_pairs(*_, **__):
    rng = random.Random(1)
    compared = [toy._compare(rng, toy.write_prompt(rng), 1.0) for _ in range(40)]
    return compared[:30], compared[30:]


def run_rm(out, model, stop=None, **changes):
    """train_rm.train in the folder `out`, on thirty pairs with ten held out."""
    given = dict(
        dataset="-",
        model=model,
        steps=6,
        batch_size=4,
        lr=1e-2,
        eval_every=4,
        save_every=1,
        keep=2,
        seed=5,
        device="cpu",
    )
    config = train_rm.resolve(train_rm.Config(**(given | changes)))
    run = new_run(out, config, torch.float32, stop)
    real, pairs.load_pairs = pairs.load_pairs, tiny_pairs
    try:
        parts = train_rm.load(config, CPU)
    finally:
        pairs.load_pairs = real
    run.write_config()
    return train_rm.train(run, *parts)


def warp_config(**changes):
    given = dict(steps=3, eval_every=3, anchor="ema", mu=0.3, iterations=2, runs=2)
    given = dataclasses.asdict(policy_config()) | given | dict(etas="0,0.5,1", keep_etas="0.5")
    return warp.resolve(warp.Config(**(given | changes)))


def run_warp(out, stop=None, function=reward, **changes):
    run = new_run(out, warp_config(**changes), torch.float32, stop)
    return warp.run_warp(run, tiny_task(function))


SCRIPTS = ("train_policy", "train_rm", "warp")


def run_script(script, out, model, **changes):
    """A run of one of SCRIPTS that is long enough to be killed."""
    if script == "train_policy":
        run_policy(out, anchor="ema", mu=0.1, steps=12, **changes)
    elif script == "train_rm":
        run_rm(out, model, steps=12, lora_rank=2, lora_dropout=0.3, **changes)
    else:
        run_warp(out, **changes)


def child(script, out, model, **changes):
    """run_script in a process of its own, quietly."""
    torch.set_num_threads(1)
    with open(f"{out}.log", "a") as log, open(os.devnull, "w") as bar:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(bar):
            run_script(script, out, model, **changes)


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


def content(out):
    """What a run left, without what may differ (times): path -> rows, tensors, JSON or bytes."""
    found = {}
    for path in sorted(p for p in Path(out).rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [without(row, "seconds", "tokens_per_second") for row in rows]
        elif path.name == "state.pt":
            found[name] = torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            found[name] = without(json.loads(path.read_text()), "argv", "resume")
        else:
            found[name] = path.read_bytes()
    return found


def difference(a, b, where="", tolerance=0.0):
    """Where two nested contents differ first, in words, and "" where they are equal."""
    if type(a) is not type(b):
        return f"{where}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, torch.Tensor):
        if a.shape != b.shape:
            return f"{where}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
        if torch.equal(a, b) or (tolerance and torch.allclose(a, b, 0, tolerance)):
            return ""
        return f"{where}: tensors differ by {(a.double() - b.double()).abs().max()}"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where}: {sorted(map(str, a.keys() ^ b.keys()))} in one alone"
        a, b, names = a.values(), b.values(), list(a)
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} items"
        names = range(len(a))
    else:
        near = isinstance(a, float) and abs(a - b) <= tolerance * max(1, abs(a))
        same = a == b or (tolerance and near)
        return "" if same else f"{where}: {a!r:.200} and {b!r:.200}"
    for x, y, name in zip(a, b, names):
        if found := difference(x, y, f"{where}/{name}", tolerance):
            return found
    return ""


def kill_and_resume(context, script, out, model, kills, rng, seconds):
    """SIGKILL a run `kills` times at random instants, resume it each time, and let it end.

    `seconds` is what an undisturbed run takes. A run that ended before its kill is not counted.
    Returns the instants, in seconds since the process began.
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
            status = f"exit status {process.exitcode} after {len(instants)} kills"
            sys.exit(f"{script}: {status}, see {out}.log")
        else:
            return instants


def full_disk(script, out, model):
    """A run that is resumed where no file may grow beyond 20 kB. Errors are one line."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard_limit))
    with open(f"{out}.err", "w") as errors, contextlib.redirect_stderr(errors), one_line_errors():
        child(script, out, model, resume=True, save_every=2)


def stuck(out):
    """A step that does not end."""
    with (
        open(f"{out}/err", "w") as errors,
        contextlib.redirect_stderr(errors),
        one_line_errors(),
        stop_after_step(Path(out)),
    ):
        Path(out, "started").touch()
        time.sleep(60)
