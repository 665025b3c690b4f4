"""What transformers 5 writes in a new way, repeated where transformers 4 and other readers look.

They would take what is not there for their defaults, without a word: a RoPE base of 10,000.
"""

import json
from pathlib import Path


def write_for_older_readers(folder: Path, dtype: str = "") -> None:
    """Complete the config.json and tokenizer_config.json of a folder, those that are there.

    Newer readers see what they saw before.

    Args:
        dtype: of the weights, where config.json may name another.
    """
    for name, complete in (("config.json", _add_rope), ("tokenizer_config.json", _name_tokenizer)):
        path = folder / name
        if path.is_file():
            config = json.loads(path.read_text("utf-8"))
            complete(config, dtype)
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _add_rope(config: dict, dtype: str) -> None:
    for key, part in config.items():
        if isinstance(part, dict) and key != "rope_parameters":
            _add_rope(part, dtype)  # of a composite config
    if dtype:
        config.update({key: dtype for key in ("dtype", "torch_dtype") if key in config})
    if "num_local_experts" in config:  # of Qwen3-MoE, there num_experts
        config.setdefault("num_experts", config["num_local_experts"])
    rope = config.get("rope_parameters") or {}
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    names = ("rope_theta", "partial_rotary_factor", "rope_local_base_freq")
    if config.get("model_type", "").startswith("gpt_neox"):
        names = ("rotary_emb_base", "rotary_pct", "")
    values = (full.get("rope_theta"), full.get("partial_rotary_factor"), local.get("rope_theta"))
    config.update({name: value for name, value in zip(names, values) if value is not None})
    scaling = {k: v for k, v in full.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if config.get("model_type") == "phi3" and "rope_type" in scaling:  # which takes these alone
        scaling = {"type": scaling["rope_type"]} | {
            key: scaling[key] for key in ("short_factor", "long_factor") if key in scaling
        }
    if scaling.keys() - {"rope_type", "type"}:
        config["rope_scaling"] = scaling


def _name_tokenizer(config: dict, _: str) -> None:
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
