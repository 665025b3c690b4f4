"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): only A and B are trained, W is frozen.

    W x + alpha/r B A x        (eq. 3, scaled by alpha/r)

B starts at zero, so a fresh adapter changes nothing. With its adapters off, a policy is the model
that it started from: the fixed anchor needs no second model. A second set of adapter weights is the
moving anchor.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput

from ..running.errors import UserError


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter: base(x) + scaling B A dropout(x)."""

    def __init__(self, base: nn.Linear | Conv1D, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        d_in, d_out = base.weight.shape  # as Conv1D has it
        if isinstance(base, nn.Linear):
            d_in, d_out = d_out, d_in
        like = {"device": base.weight.device, "dtype": torch.float32}
        self.base = base
        self.lora_A = nn.Parameter(torch.empty(rank, d_in, **like))
        self.lora_B = nn.Parameter(torch.zeros(d_out, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)  # as the paper's code
        self.scaling, self.dropout, self.on = alpha / rank, dropout, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        if not self.on:
            return self.base(x)
        dropped = nn.functional.dropout(x, self.dropout, self.training).to(self.lora_A.dtype)
        low = nn.functional.linear(dropped, self.lora_A)  # (..., rank)
        return self.base(x) + self.scaling * nn.functional.linear(low, self.lora_B)

    @property
    def weight(self) -> torch.Tensor:
        """W + scaling B A, in the layer's own layout: some models read it and do not call."""
        if not self.on:
            return self.base.weight
        delta = self.scaling * self.lora_B @ self.lora_A  # (out, in)
        return self.base.weight + (delta if isinstance(self.base, nn.Linear) else delta.T)

    @property
    def bias(self) -> torch.Tensor | None:
        """That of the layer itself."""
        return self.base.bias


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Every adapter of a model by the name of its layer."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)
    }


def add_lora_(
    model: PreTrainedModel,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: list[str] | None = None,
) -> None:
    """Freeze the body of `model` and put an adapter on each target layer.

    A reward head is still trained in full.

    Args:
        model: changed in place.
        rank: r, the rows of A and columns of B.
        alpha: adapters count alpha / rank. None: twice the rank.
        dropout: probability of dropping an input of an adapter in training mode.
        targets: last parts of names, such as ["q_proj", "v_proj"]. None: every linear layer of the
            body. Layers that compute something else from their weight, such as routers, are none.
    Raises:
        UserError: no layer of the body has such a name, or the model has adapters already,
            or no layer has such a rank.
    """
    body = model.base_model
    linear = {
        name: module
        for name, module in body.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and _is_linear(module)
    }
    if lora_layers(model):
        raise UserError("the model has adapters already: merge_lora_ first")
    chosen = [name for name in linear if targets is None or name.split(".")[-1] in targets]
    missing = set(targets or ()) - {name.split(".")[-1] for name in chosen}
    if missing or not chosen:
        names = ", ".join(sorted({name.split(".")[-1] for name in linear}))
        raise UserError(
            f"--lora-targets: no linear layer is called {', '.join(sorted(missing)) or 'anything'}:"
            f" expected some of {names}"
        )
    largest = max(min(linear[name].weight.shape) for name in chosen)
    if rank > largest:
        raise UserError(f"--lora-rank {rank}: no layer has a rank above {largest}: lower it")
    body.requires_grad_(False)
    if model.get_output_embeddings() is not None:
        model.get_output_embeddings().requires_grad_(False)
    for name in chosen:
        parent, _, child = name.rpartition(".")
        adapter = LoraLinear(linear[name], rank, alpha or 2.0 * rank, dropout).train(body.training)
        setattr(body.get_submodule(parent), child, adapter)


@torch.no_grad()
def _is_linear(layer: nn.Linear | Conv1D) -> bool:
    """Whether a layer, perhaps of a class derived from Linear, gives W x + b and nothing else."""
    if type(layer) in (nn.Linear, Conv1D):
        return True
    try:
        x = torch.linspace(-1, 1, layer.in_features, device=layer.weight.device)[None]
        given, plain = layer(x), nn.Linear.forward(layer, x)
        return given.shape == plain.shape and torch.allclose(given, plain, 1e-4, 1e-5)
    except Exception:  # a tuple, or other inputs
        return False


def dense_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict that the model would have without adapters, their products added in."""
    layers = lora_layers(model)
    state = {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in layers:
            continue  # A or B itself
        layer = owner.removesuffix(".base")
        if layer in layers and owner.endswith(".base"):
            name = f"{layer}.{leaf}"
            tensor = layers[layer].weight.detach() if leaf == "weight" else tensor
        state[name] = tensor
    return state


@torch.no_grad()
def merge_lora_(model: nn.Module) -> None:
    """Add every adapter's product to its weight and put the plain layer back.

    All weights are trainable again.
    """
    for name, layer in lora_layers(model).items():
        parent, _, child = name.rpartition(".")
        layer.base.weight.copy_(layer.weight)
        setattr(model.get_submodule(parent), child, layer.base)
    model.requires_grad_(True)


class AdapterView:
    """A model as it is with its adapters off, or with other adapter weights.

    It is called in the model's place, without a copy of it.

    Args:
        model: the model with adapters.
        parameters: the other weights, in the order of `adapter_parameters`. None turns the adapters
            off.
    """

    def __init__(self, model: PreTrainedModel, parameters: list[torch.Tensor] | None) -> None:
        self.model, self.weights = model, parameters

    def parameters(self) -> list[torch.Tensor]:
        """The view's own adapter weights."""
        return self.weights or []

    def __call__(self, **inputs: object) -> ModelOutput:
        """As the model itself."""
        with self._in_place():
            return self.model(**inputs)

    def base_model(self, **inputs: object) -> ModelOutput:
        """As the model's own body."""
        with self._in_place():
            return self.model.base_model(**inputs)

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)  # config, device, modules, the LM head

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        layers, live = lora_layers(self.model).values(), adapter_parameters(self.model)
        own = [parameter.data for parameter in live]
        try:
            if self.weights is None:
                for layer in layers:
                    layer.on = False
            else:
                for parameter, weight in zip(live, self.weights):
                    parameter.data = weight
            yield
        finally:
            for layer in layers:
                layer.on = True
            for parameter, weight in zip(live, own):
                parameter.data = weight


@contextlib.contextmanager
def adapters_in_place(model: PreTrainedModel | AdapterView) -> Iterator[PreTrainedModel]:
    """The model itself; that of a view, as the view shows it."""
    if not isinstance(model, AdapterView):
        yield model
        return
    with model._in_place():
        yield model.model


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapter, in the order of the layers."""
    return [
        parameter
        for layer in lora_layers(model).values()
        for parameter in (layer.lora_A, layer.lora_B)
    ]


def save_adapter(model: PreTrainedModel, folder: str | Path, base: str) -> None:
    """Write the adapters, and a reward head, in the files of PEFT.

    These are adapter_config.json and adapter_model.safetensors.

    Args:
        model: a model with adapters.
        folder: where to; made if it is not there.
        base: the model that the adapters belong to: where PEFT, and load_policy, look for it.
    """
    layers = lora_layers(model)
    one = next(iter(layers.values()))
    tensors = {
        f"{name}.{part}.weight": getattr(layer, part)
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B")
    }
    head = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.endswith(("lora_A", "lora_B"))
    }
    tensors = {
        f"base_model.model.{name}": tensor.detach().contiguous()
        for name, tensor in (tensors | head).items()
    }
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        # A path relative to here would be another one elsewhere.
        "base_model_name_or_path": os.path.abspath(base) if os.path.isdir(base) else base,
        "r": one.lora_A.shape[0],
        "lora_alpha": one.scaling * one.lora_A.shape[0],
        "lora_dropout": one.dropout,
        "target_modules": sorted({name.split(".")[-1] for name in layers}),
        "modules_to_save": sorted({name.split(".")[0] for name in head}) or None,
        "fan_in_fan_out": isinstance(one.base, Conv1D),
        "bias": "none",
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def load_adapter_(model: PreTrainedModel, folder: str | Path) -> set[str]:
    """Add saved adapters to the weights of their base model, and put in a reward head.

    Returns:
        The names of the reward head's weights.
    Raises:
        UserError: something does not fit.
    """
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    variants = [
        "use_dora",
        "use_rslora",
        "use_qalora",
        "lora_bias",
        "alpha_pattern",
        "rank_pattern",
    ]
    variants += ["rank_pattern", "layer_replication", "alora_invocation_tokens"]
    odd = any(config.get(key) for key in variants)
    # Other ways to start adapters change the base's weights, too.
    init = config.get("init_lora_weights", True)
    odd |= isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal")
    if config.get("peft_type") != "LORA" or config.get("bias") != "none" or odd:
        raise UserError(
            f"{folder}: an adapter of another kind than plain LoRA: merge it with peft first"
        )
    tensors = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in _adapter_tensors(folder).items()
    }
    scaling, state = config["lora_alpha"] / config["r"], model.state_dict()
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        delta = scaling * tensors.pop(f"{layer}.lora_B.weight").float() @ tensors.pop(name).float()
        delta = delta.T if config.get("fan_in_fan_out") else delta
        _require_fit(folder, f"{layer}.weight", delta, state)
        state[f"{layer}.weight"].add_(delta)
    for name, tensor in tensors.items():
        _require_fit(folder, name, tensor, state)
        if sum(other.data_ptr() == state[name].data_ptr() for other in state.values()) > 1:
            raise UserError(
                f"{folder}: {name} is tied to another weight of the base model: "
                "merge it with peft first"
            )
        state[name].copy_(tensor)
    return set(tensors)


def _adapter_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    path = Path(folder) / "adapter_model.safetensors"
    if path.is_file():
        return load_file(path)
    return torch.load(path.with_suffix(".bin"), map_location="cpu", weights_only=True)


def _require_fit(
    folder: str | Path, name: str, tensor: torch.Tensor, state: dict[str, torch.Tensor]
) -> None:
    if name not in state or state[name].shape != tensor.shape:
        own = list(state[name].shape) if name in state else "no such weight"
        raise UserError(
            f"{folder}: {name} does not fit the base model: got {list(tensor.shape)}, the base "
            f"model has {own}"
        )


def adapter_labels(folder: str | Path) -> int | None:
    """How many outputs the reward head in a folder of adapters has.

    None where the folder holds no adapters or no head.
    """
    if not os.path.isfile(os.path.join(folder, "adapter_config.json")):
        return None
    endings = (".score.weight", ".classifier.weight", ".out_proj.weight")
    heads = [tensor for name, tensor in _adapter_tensors(folder).items() if name.endswith(endings)]
    return heads[0].shape[0] if heads else None
