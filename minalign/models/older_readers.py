"""What transformers 5 writes in a new way, repeated where transformers 4 and other readers look.

They would take what is not there for their defaults, without a word: a RoPE base of 10,000.
"""

import json
from pathlib import Path


def write_for_older_readers(folder: Path, dtype: str = "") -> None:
    """Complete the config.json and tokenizer_config.json that transformers saved in a folder.

    A file that is not there is left out. Newer readers see what they saw before.

    Args:
        folder: of a model, an adapter or a tokenizer.
        dtype: of the weights, where config.json may name another.
    """
    for name, complete in (("config.json", _add_rope), ("tokenizer_config.json", _name_tokenizer)):
        path = folder / name
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            complete(config, dtype)
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _add_rope(config: dict, dtype: str) -> None:
    """rope_parameters -> rope_theta, rope_scaling and their like, also in the parts of a whole."""
    for key, part in config.items():
        if isinstance(part, dict) and key != "rope_parameters":
            _add_rope(part, dtype)
    if dtype:
        config.update({key: dtype for key in ("dtype", "torch_dtype") if key in config})
    rope = config.get("rope_parameters") or {}
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention") or {}
    if not isinstance(full, dict) or full.get("rope_theta") is None:
        return
    theta, share, local_theta = "rope_theta", "partial_rotary_factor", "rope_local_base_freq"
    family = config.get("model_type", "")
    if family.startswith("gpt_neox"):
        theta, share = "rotary_emb_base", "rotary_pct"
    elif family.startswith("modernbert"):
        theta, local_theta = "global_rope_theta", "local_rope_theta"
    config[theta] = full["rope_theta"]
    if "partial_rotary_factor" in full:
        config[share] = full["partial_rotary_factor"]
    if "rope_theta" in local:
        config[local_theta] = local["rope_theta"]
    scaling = {k: v for k, v in full.items() if k not in ("rope_theta", "partial_rotary_factor")}
    # Of a modernbert, newer readers would take it for both kinds of layers.
    if scaling.keys() - {"rope_type", "type"} and not family.startswith("modernbert"):
        config["rope_scaling"] = scaling
        if scaling.get("rope_type") == "longrope":
            key = "original_max_position_embeddings"
            config[key] = scaling.get(key, config.get("max_position_embeddings"))


def _name_tokenizer(config: dict, _: str) -> None:
    """Names of the class and of the special tokens that both know."""
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
