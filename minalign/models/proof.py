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

_PROVED: weakref.WeakKeyDictionary[PreTrainedModel, tuple] = weakref.WeakKeyDictionary()
_SAID: set[str] = set()


def can_decode(model: PreTrainedModel | AdapterView) -> bool:
    """Whether decoder.py may run in place of this model's own forward pass.

    If not, transformers runs it, and one line says why. It is tried out anew once the model's
    configuration or the class of a module has changed.
    """
    if isinstance(model, AdapterView):
        model = model.model
    used = model if model.get_output_embeddings() is not None else model.base_model
    modules = list(used.modules())
    kinds = ((type(module), vars(module).get("is_causal")) for module in modules)
    state = (repr(vars(model.config)), model.dtype, *kinds)
    if any(map(_is_changed, modules)):
        reason = "hooks, or a forward pass that was replaced"
    else:
        if model not in _PROVED or _PROVED[model][0] != state:
            _PROVED[model] = state, _mismatch(model)
        reason = _PROVED[model][1]
    line = f"  note: {model.config.model_type}: {reason}: transformers' own passes are taken"
    if reason and line not in _SAID:
        _SAID.add(line)
        print(line)
    return not reason


def _is_changed(module: torch.nn.Module) -> bool:
    """Whether a module does more than its class says."""
    replaced = "forward" in vars(module) and not is_checkpointed(module)
    return bool(replaced or module._forward_hooks or module._forward_pre_hooks)


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
    allowed = 1e-4 if model.dtype in (torch.float32, torch.float64) else 0.05
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
