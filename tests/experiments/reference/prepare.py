"""What is downloaded, in the form that run.py takes (docs/reference_runs.md has the addresses).

    python tests/experiments/reference/prepare.py ratings movieReviewSnippets_GroundTruth.txt \\
        --individual movieReviewSnippets_anonDataRatings.txt --out movie_snippets.jsonl
    python tests/experiments/reference/prepare.py llama2c stories260K.pt --tokenizer tok512.bin \\
        --out stories260k

The first makes JSON lines with text, rating (the mean) and rating_std of VADER's tables. The second
makes a Hugging Face folder of a checkpoint that llama2.c has trained, and of its tokenizer.
"""

import argparse
import json
import struct
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAMES = {  # llama2.c -> LlamaForCausalLM
    "tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "norm": "model.norm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def ratings(table: str, individual: str = "") -> list[dict]:
    """Rows of VADER's tables: id, mean, text; and id, mean, deviation, the single ratings."""
    deviations = dict(line.split("\t")[::2][:2] for line in individual.splitlines())
    found = []
    for line in table.splitlines():
        number, mean, text = line.split("\t", 2)
        row = {"text": text.strip(), "rating": round(float(mean), 4)}
        deviation = deviations.get(number)
        found.append(row | ({"rating_std": float(deviation)} if deviation else {}))
    return found


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection, from pairs that RoPE turns side by side to two halves."""
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def llama(checkpoint: dict) -> LlamaForCausalLM:
    """A transformers model with the weights of a checkpoint of llama2.c's train.py."""
    given, weights = checkpoint["model_args"], {}
    kv_heads = given.get("n_kv_heads") or given["n_heads"]
    for name, weight in checkpoint["model"].items():
        name = name.removeprefix("_orig_mod.").removesuffix(".weight")
        if "freqs" in name:  # computed
            continue
        layer, name = ".".join(name.split(".")[:2]), name.removeprefix("layers.")
        if layer.startswith("layers."):
            name = name.split(".", 1)[1]
            layer = f"model.{layer}."
        else:
            layer = ""
        if name in ("attention.wq", "attention.wk"):
            weight = halves(weight, given["n_heads"] if name.endswith("q") else kv_heads)
        weights[f"{layer}{NAMES[name]}.weight"] = weight.float()
    embedding = weights["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=len(embedding),
        hidden_size=given["dim"],
        intermediate_size=len(weights["model.layers.0.mlp.gate_proj.weight"]),
        num_hidden_layers=given["n_layers"],
        num_attention_heads=given["n_heads"],
        num_key_value_heads=kv_heads,
        max_position_embeddings=given["max_seq_len"],
        rms_norm_eps=given.get("norm_eps", 1e-5),
        tie_word_embeddings=torch.equal(weights.get("lm_head.weight", embedding), embedding),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict({"lm_head.weight": embedding} | weights)
    # Stories follow each other with a begin token alone between them.
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=[1, 2])
    return model


def tokenizer(content: bytes, length: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a llama2.c .bin file: the longest piece, then score, size, piece of each.

    Args:
        length: of the model's context.
    """
    pieces, place = [], 4
    while place < len(content):
        _, size = struct.unpack_from("<fi", content, place)
        pieces.append(content[place + 8 : place + 8 + size].decode())
        place += 8 + size
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = special + [piece.replace(" ", "▁") for piece in pieces[len(special) :]]
    ids = {piece: i for i, piece in enumerate(pieces)}  # of BPE, in the order of their merges
    merges = []
    for piece in pieces[len(special) :]:
        parts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [part for part in parts if ids.keys() >= set(part)]
        merges += sorted(known, key=lambda part: (ids[part[0]], ids[part[1]]))
    bpe = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = Tokenizer(bpe)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    named = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=length, **named)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, read, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("ratings", "llama2c"))
    parser.add_argument("file", type=Path, help="the table, or the checkpoint (.pt)")
    parser.add_argument("--individual", type=Path, help="the table of single ratings")
    parser.add_argument("--tokenizer", type=Path, help="tok512.bin or the like")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    if given.kind == "ratings":
        single = given.individual.read_text(encoding="utf-8") if given.individual else ""
        rows = ratings(given.file.read_text(encoding="utf-8"), single)
        given.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{len(rows)} rated texts in {given.out}, such as {rows[0]['text']!r}")
    else:
        if not given.tokenizer:
            parser.error("llama2c needs --tokenizer")
        model = llama(torch.load(given.file, map_location="cpu", weights_only=True))
        model.save_pretrained(given.out)
        length = model.config.max_position_embeddings
        tokenizer(given.tokenizer.read_bytes(), length).save_pretrained(given.out)
        print(f"{sum(p.numel() for p in model.parameters())} parameters in {given.out}")


if __name__ == "__main__":
    main()
