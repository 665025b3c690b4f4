"""Merging whole models, as state dicts: task vectors, the merge of M policies, LITI (WARP, arXiv 2406.16768).

Each function stands alone: `import torch` and `import math` above a copy are enough.
"""

import math

import torch


def task_vector(state: dict[str, torch.Tensor], init_state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What training added to the weights.

        delta = theta - theta_init        (Ilharco et al., arXiv 2212.04089)

    Args:
        state, init_state: state dicts with the same keys and shapes, any floating dtypes.
    Returns:
        dict of float32 tensors; integer and boolean buffers are left out.
    Raises:
        ValueError: a key or a shape differs; it is named.

    >>> task_vector({"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])})
    {'w': tensor([2.])}
    """
    for name in dict.fromkeys([*init_state, *state]):
        shapes = [tuple(s[name].shape) if name in s else "missing" for s in (init_state, state)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"got {name!r}: {shapes[0]} and {shapes[1]}, expected the same keys and shapes")
    return {
        name: state[name].detach().float() - tensor.detach().float()
        for name, tensor in init_state.items()
        if tensor.is_floating_point()
    }


def liti(init_state: dict[str, torch.Tensor], state: dict[str, torch.Tensor], eta: float) -> dict[str, torch.Tensor]:
    """Linear interpolation towards the initialisation.

        (1 - eta) theta_init + eta theta        (WARP, arXiv 2406.16768: LITI)

    Args:
        init_state, state: state dicts with the same keys and shapes.
        eta: 0 gives theta_init and 1 gives theta, bit for bit; above 1 it extrapolates.
    Returns:
        dict of new tensors in the init's dtypes, computed in float32; integer and boolean buffers are the init's.
    Raises:
        ValueError: a key or a shape differs; it is named.

    >>> liti({"w": torch.tensor([0.0])}, {"w": torch.tensor([2.0])}, 0.25)
    {'w': tensor([0.5000])}
    """
    for name in dict.fromkeys([*init_state, *state]):
        shapes = [tuple(s[name].shape) if name in s else "missing" for s in (init_state, state)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"got {name!r}: {shapes[0]} and {shapes[1]}, expected the same keys and shapes")
    return {
        name: ((1 - eta) * tensor.detach().float() + eta * state[name].detach().float()).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in init_state.items()
    }


@torch.no_grad()
def merge_policies(
    init_state: dict[str, torch.Tensor],
    states: list[dict[str, torch.Tensor]],
    method: str = "slerp",
    scope: str = "layer",
    lam: float | None = None,
    out: dict[str, torch.Tensor] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    """Merge M policies that were trained from one initialisation.

        theta = theta_init + sum_m c_m (theta_m - theta_init), with coefficients c from the angles of each group

    A merge of task vectors is a weighted sum of them, and SLERP's weights follow from their dot products alone: one
    pass over the tensors for the dot products, one for the sums. Both go block by block, so that states may be lazy
    mappings of name to tensor and `out` may write each tensor away. In float32, and in float64 where it shows: one
    policy alone, and vectors within a degree of parallel or opposite.

    Args:
        init_state, states: theta_init and the M >= 1 policies, same keys and shapes, any floating dtypes.
        method: "slerp" (the recursion of `slerp_many`), "slerp-symmetric" (mean direction, mean norm: no order),
            "lerp" (mean).
        scope: what shares an angle: "layer" (a transformer block; embeddings, final norm and head each by
            themselves; the paper's), "tensor", or "model" (the whole flattened vector).
        lam: weight of the second of two policies; None is 1/M.
        out: receives the merged tensors by name; None is a new dict.
    Returns:
        out, in the init's dtypes (buffers that are not floating are the init's), and a report: for each group
        {"angle": mean over pairs, degrees, None where a vector is zero or M = 1, "norms": of the M task vectors,
        "norm": of the merged one}.
    Raises:
        ValueError: a key or shape differs (named), no states, an unknown word, or lam with other than two states.

    Tensors that share their storage in init and states (tied embeddings) count and are merged once.

    >>> init, a, b = ({"w": torch.tensor(w)} for w in ([1.0, 1.0], [2.0, 1.0], [1.0, 2.0]))
    >>> merged, report = merge_policies(init, [a, b])
    >>> merged["w"], report["w"]["angle"]
    (tensor([1.7071, 1.7071]), 90.0)
    """
    if method not in ("slerp", "slerp-symmetric", "lerp"):
        raise ValueError(f"got method={method!r}, expected 'slerp', 'slerp-symmetric' or 'lerp'")
    if scope not in ("layer", "tensor", "model"):
        raise ValueError(f"got scope={scope!r}, expected 'layer', 'tensor' or 'model'")
    if not states or (lam is not None and (len(states) != 2 or method == "slerp-symmetric")):
        raise ValueError(f"got {len(states)} states, method={method!r} and lam={lam}, expected 1 or more; lam is for two")
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (init_state, *states)]
    for m, found in enumerate(shapes[1:], 1):
        for name in dict.fromkeys([*shapes[0], *found]):
            if shapes[0].get(name) != found.get(name):
                raise ValueError(
                    f"got {name!r}: {shapes[0].get(name, 'missing')} in the init and {found.get(name, 'missing')} in policy {m}, "
                    "expected the same keys and shapes: merge policies of one init"
                )

    def group_of(name):
        if scope != "layer":
            return name if scope == "tensor" else "model"
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        return ".".join(parts[: number + 1] if number is not None else parts[:-1]) or name

    def blocks(name, dtype):
        """theta_init (n,) and the task vectors (M, n) of a tensor, few enough elements at a time to stay in the cache."""
        flat = [state[name].reshape(-1).split(2**18) for state in (init_state, *states)]
        scratch = torch.empty(len(states), flat[0][0].numel(), dtype=dtype, device=flat[0][0].device)
        for theta_init, *parts in zip(*flat):
            theta_init, deltas = theta_init.to(dtype), scratch[:, : theta_init.numel()]
            for delta, part in zip(deltas, parts):
                torch.sub(part.to(dtype), theta_init, out=delta)
            yield theta_init, deltas

    def dot_products(names, dtype):
        """Of the task vectors of a group, (M, M) in float64. Not `deltas @ deltas.T`: its float32 sums are 30 times less exact."""
        every = (deltas for name in names for _, deltas in blocks(name, dtype))
        return sum(torch.stack([(delta * deltas).sum(1) for delta in deltas]).double() for deltas in every)

    def cosines(gram):
        """Of the pairs of task vectors, (M (M - 1) / 2,); NaN where one is zero."""
        norms = gram.diagonal().sqrt()
        return (gram / (norms[:, None] * norms)).clamp(-1, 1)[tuple(torch.triu_indices(len(states), len(states), 1))]

    def coefficients(gram):
        """c (M,) from the dot products of the task vectors (M, M)."""
        norms = gram.diagonal().sqrt()
        lerp_weights = torch.full_like(norms, 1 / len(states)) if lam is None else norms.new_tensor([1 - lam, lam])
        if method == "slerp-symmetric":
            unit = 1 / norms
            length = (unit @ gram @ unit).clamp(min=0).sqrt()  # of the sum of the unit vectors
            return norms.mean() / length * unit if norms.all() and length > 1e-6 else lerp_weights
        if method == "lerp":
            return lerp_weights
        merged = torch.zeros_like(norms)
        merged[0] = 1.0
        for m in range(1, len(states)):
            weight = 1 / (m + 1) if lam is None else lam
            product = ((merged @ gram @ merged).clamp(min=0).sqrt() * norms[m]).item()
            cosine = (merged @ gram[m]).item() / product if product else 1.0
            angle = math.acos(max(-1.0, min(1.0, cosine)))
            if math.sin(angle) < 1e-6:  # parallel, opposite or zero: as in slerp
                merged = (1 - weight) * merged
                merged[m] = weight
            else:
                merged = math.sin((1 - weight) * angle) / math.sin(angle) * merged
                merged[m] = math.sin(weight * angle) / math.sin(angle)
        return merged

    groups, first_name, tied = {}, {}, []
    in_memory = all(isinstance(state, dict) for state in (init_state, *states))  # a lazy tensor has no lasting address
    for name, shape in shapes[0].items():
        storages = (shape, *(state[name].data_ptr() for state in (init_state, *states))) if in_memory else name
        if storages in first_name:
            tied.append((name, first_name[storages]))
        else:
            first_name[storages] = name
            groups.setdefault(group_of(name), []).append(name)

    out = {} if out is None else out
    report = {}
    for group, names in groups.items():
        floating = [name for name in names if init_state[name].is_floating_point()]
        for name in set(names) - set(floating):
            out[name] = init_state[name].clone()
        if not floating:
            continue
        # float32 does not know the angles of vectors that are parallel, opposite (each pair, or one and the merge of those before
        # it: the weights grow) or too small to square. And a policy that is the whole merge comes back bit for bit.
        whole = len(states) == 1 or lam in (0, 1)
        for dtype in [torch.float64] if whole else [torch.float32, torch.float64]:
            gram = dot_products(floating, dtype)
            weights = coefficients(gram)
            if weights.abs().max() <= 10 and (cosines(gram).abs() < 1 - 1e-4).all():
                break
        for name in floating:
            merged = torch.empty(init_state[name].shape, dtype=init_state[name].dtype, device=gram.device)
            for part, (theta_init, deltas) in zip(merged.view(-1).split(2**18), blocks(name, dtype)):
                part.copy_(theta_init + weights.to(dtype) @ deltas)
            out[name] = merged
        angles = cosines(gram).acos().rad2deg()
        report[group] = {
            "angle": angles.mean().item() if len(angles) and angles.isfinite().all() else None,
            "norms": gram.diagonal().sqrt().tolist(),
            "norm": (weights @ gram @ weights).clamp(min=0).sqrt().item(),
        }
    for name, first in tied:
        out[name] = out[first]
    return out, report
