"""Whether our decoder computes what transformers computes of a model: tried out once for each."""

import weakref

import torch
from transformers import PreTrainedModel

from ..logprobs import position_ids_from_mask
from ..running.errors import is_out_of_memory
from .activations import is_checkpointed
from .caches import OwnCache
from .decoder import read_texts
from .families import FAMILIES, read_decoder
from .folders import first_line
from .lora import AdapterView
from .padding import context_of
from .precision import dropout_off

_PROVED: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()
_SAID: set[str] = set()


def can_decode(model: PreTrainedModel | AdapterView) -> bool:
    """Whether decoder.py may run in place of this model's own forward pass.

    If not, transformers runs it, and one line says why. Hooks on the model are never passed by.
    """
    if isinstance(model, AdapterView):
        model = model.model
    used = model if model.get_output_embeddings() is not None else model.base_model
    for module in used.modules():
        replaced = "forward" in vars(module) and not is_checkpointed(module)
        if replaced or module._forward_hooks or module._forward_pre_hooks:
            return False
    if model not in _PROVED:
        reason = _mismatch(model)
        _PROVED[model] = not reason
        line = f"  note: {model.config.model_type}: {reason}: transformers' own passes are taken"
        if reason and line not in _SAID:
            _SAID.add(line)
            print(line)
    return _PROVED[model]


def _mismatch(model: PreTrainedModel) -> str:
    """Why the decoder does not run this model; "" where it does."""
    if model.config.model_type not in FAMILIES:
        return "a family that minalign's decoder does not know"
    try:
        gap = _largest_gap(model)
    except Exception as error:  # whatever weights of another shape raise
        if is_out_of_memory(error):
            raise
        return f"minalign's decoder does not fit ({type(error).__name__}: {first_line(error)})"
    allowed = 1e-4 if model.dtype == torch.float32 else 0.05
    return "" if gap <= allowed else f"minalign's decoder is off by {gap:.1g} of the largest logit"


@torch.no_grad()
def _largest_gap(model: PreTrainedModel) -> float:
    """Of three short rows padded on the left, in one pass and with the last token from a cache.

    In units of transformers' largest logit (of a body alone, of its largest hidden state).
    """
    n = min(7, context_of(model.config) or 7)
    starts = torch.tensor([[0], [(n - 1) // 2], [max(0, n - 2)]], device=model.device)
    mask = torch.arange(n, device=model.device) >= starts  # (3, n)
    known = model.get_input_embeddings().num_embeddings
    ids = torch.randint(known, mask.shape, generator=torch.Generator().manual_seed(0))
    ids, positions = ids.to(model.device) * mask, position_ids_from_mask(mask)
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}
    with dropout_off(model), torch.autocast(model.device.type, enabled=False):
        decoder = read_decoder(model)
        ours = read_texts(decoder, ids, mask)
        if decoder.head is None:
            theirs = model.base_model(**inputs).last_hidden_state
        else:
            ours, theirs = decoder.head(ours), model(**inputs).logits
        gaps = (ours - theirs)[mask].abs().max()
        if decoder.head is not None and n > 1:
            cache = OwnCache(model, ids[:, :-1], mask[:, :-1], 1)
            last = (cache.next(ids[:, -1:]) - theirs[:, -1]).abs().max()
            gaps = torch.maximum(gaps, last)
    return (gaps / theirs[mask].abs().max()).item()
