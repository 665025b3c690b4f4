"""Weights in motion: EMA, task vectors, SLERP, LERP, RAM and LITI (WARP, arXiv 2406.16768).

Everything is taken from task vectors delta = theta - theta_init: full weights are nearly collinear,
so that SLERP of them is just LERP. A function needs nothing but `import torch`, `import math` and
the functions of this file that it names to be pasted elsewhere. First come those of tensors, then
those of state dicts.
"""

import math

import torch


@torch.no_grad()
def ema_update_(
    ema_parameters: list[torch.Tensor], parameters: list[torch.Tensor], mu: float
) -> None:
    """Move the averaged weights a step towards the policy's, in place.

        ema <- (1 - mu) ema + mu theta
        (WARP, arXiv 2406.16768, Algorithm 1; after the policy's own update)

    A tensor that is listed twice (tied embeddings) moves once. Integer tensors are left alone.

    Args:
        ema_parameters: float32 tensors, changed in place. In bfloat16 a step of mu = .01 mostly
            rounds to nothing.
        parameters: the policy's tensors in the same order, any floating dtype; not changed.
        mu: in (0, 1].
    Raises:
        ValueError: mu outside (0, 1], different counts or shapes, an average that is not float32,
            or one that shares its storage with the policy (then there is no average).

    >>> ema, theta = torch.zeros(2), torch.ones(2)
    >>> ema_update_([ema], [theta], mu=0.25)
    >>> ema
    tensor([0.2500, 0.2500])
    """
    if not 0 < mu <= 1:
        raise ValueError(f"got mu={mu}, expected a rate in (0, 1]")
    ema_parameters, parameters = list(ema_parameters), list(parameters)
    if len(ema_parameters) != len(parameters):
        raise ValueError(
            f"got {len(ema_parameters)} averaged tensors and {len(parameters)}, expected the same "
            "model twice"
        )
    moved = set()
    for i, (ema, parameter) in enumerate(zip(ema_parameters, parameters)):
        if not ema.is_floating_point() or ema.data_ptr() in moved:
            continue
        problem = ""
        if ema.shape != parameter.shape:
            problem = f"shapes {tuple(ema.shape)} and {tuple(parameter.shape)}, expected one"
        elif ema.dtype != torch.float32:
            problem = f"an average in {ema.dtype}, expected float32: call .float() on its model"
        elif ema.numel() and ema.data_ptr() == parameter.data_ptr():
            problem = "one storage for average and policy, expected a copy: use deepcopy"
        if problem:
            raise ValueError(f"tensor {i}: got {problem}")
        ema.lerp_(parameter.to(ema), mu)
        moved.add(ema.data_ptr())


def lerp(delta_a: torch.Tensor, delta_b: torch.Tensor, lam: float) -> torch.Tensor:
    """Linear interpolation: weight averaging.

        (1 - lam) a + lam b        (WARP, arXiv 2406.16768: LERP)

    Args:
        delta_a, delta_b: task vectors (or weights) of one shape.
        lam: 0 gives a, 1 gives b, exactly.
    Returns:
        float32, the same shape. Unlike slerp it shortens: the norm falls to cos(angle / 2) at
        lam = .5.
    Raises:
        ValueError: the shapes differ.

    >>> lerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
    tensor([0.5000, 0.5000])
    """
    if delta_a.shape != delta_b.shape:
        raise ValueError(
            f"got shapes {tuple(delta_a.shape)} and {tuple(delta_b.shape)}, expected one"
        )
    return ((1 - lam) * delta_a.detach().double() + lam * delta_b.detach().double()).float()


def slerp_coefficients(gram: torch.Tensor, lam: float | None = None) -> torch.Tensor:
    """Weights c of M task vectors whose SLERP is sum_m c_m delta_m, from their dot products alone.

        slerp_M = slerp(slerp_{M-1}, delta_M, lam = 1/M)        (WARP, arXiv 2406.16768, eq. 26)
        slerp(a, b, lam) = sin((1 - lam) W) / sin W a + sin(lam W) / sin W b
        cos W = a.b / (|a| |b|)

    A merge of the first vectors is a weighted sum of them, so that its norm and its angle to the
    next one follow from the dot products, too. The step is LERP where an angle does not exist (a
    zero vector) or leads nowhere (vectors opposite to within 1e-6 rad, whose arc has no direction).
    Parallel vectors reach LERP by themselves.

    Args:
        gram: (M, M) float64, gram[i, j] = delta_i . delta_j.
        lam: weight of the later vector in each step; None is 1/m in the step that adds the m-th.
    Returns:
        (M,) float64.
    Raises:
        ValueError: gram is not (M, M) with M >= 1.

    >>> slerp_coefficients(torch.eye(3, dtype=torch.double))
    tensor([0.6124, 0.6124, 0.5000], dtype=torch.float64)
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise ValueError(f"got gram {tuple(gram.shape)}, expected (M, M) with M >= 1")
    norms = gram.diagonal().sqrt()
    merged = torch.zeros_like(norms)
    merged[0] = 1.0
    for m in range(1, len(gram)):
        weight = 1 / (m + 1) if lam is None else lam
        product = ((merged @ gram @ merged).clamp(min=0).sqrt() * norms[m]).item()
        cosine = (merged @ gram[m]).item() / product if product else 1.0
        # Rounding takes cosines of parallel vectors above 1.
        angle = math.acos(max(-1.0, min(1.0, cosine)))
        if math.sin(angle) < 1e-6:
            merged = (1 - weight) * merged
            merged[m] = weight
        else:
            merged = math.sin((1 - weight) * angle) / math.sin(angle) * merged
            merged[m] = math.sin(weight * angle) / math.sin(angle)
    return merged


def slerp(delta_a: torch.Tensor, delta_b: torch.Tensor, lam: float) -> torch.Tensor:
    """Spherical interpolation of two task vectors: turns without shortening.

        sin((1 - lam) W) / sin W a + sin(lam W) / sin W b,  cos W = a.b / (|a| |b|)
        (WARP, arXiv 2406.16768: SLERP)

    One angle W over all elements. The coefficients multiply the raw vectors, so the norm is kept
    only where |a| = |b|. Singular angles are treated as in `slerp_coefficients`.

    Args:
        delta_a, delta_b: task vectors of one shape, any shape; never whole weights.
        lam: 0 gives a, 1 gives b, exactly.
    Returns:
        float32, the same shape; computed in float64, finite for any finite input.
    Raises:
        ValueError: the shapes differ.

    >>> slerp(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]), 0.5)
    tensor([1.4142, 1.4142])
    """
    if delta_a.shape != delta_b.shape:
        raise ValueError(
            f"got shapes {tuple(delta_a.shape)} and {tuple(delta_b.shape)}, expected one"
        )
    flat = torch.stack([delta_a, delta_b]).detach().double().flatten(1)  # (2, n)
    return (slerp_coefficients(flat @ flat.T, lam) @ flat).view(delta_a.shape).float()


def slerp_many(deltas: list[torch.Tensor]) -> torch.Tensor:
    """SLERP of M task vectors by the paper's recursion: each joins the merge of the earlier ones.

        slerp_M = slerp(slerp_{M-1}, delta_M, lam = 1/M)        (WARP, arXiv 2406.16768, eq. 26)

    The order matters: of orthonormal vectors, the first two get weight .612 and the third .5.
    Singular angles are treated as in `slerp_coefficients`, at every step.

    Args:
        deltas: M >= 1 task vectors of one shape.
    Returns:
        float32, the same shape.
    Raises:
        ValueError: no vector, or shapes that differ.

    >>> slerp_many([torch.eye(3)[0], torch.eye(3)[1], torch.eye(3)[2]])
    tensor([0.6124, 0.6124, 0.5000])
    """
    if not deltas or any(delta.shape != deltas[0].shape for delta in deltas):
        raise ValueError(
            f"got shapes {[tuple(delta.shape) for delta in deltas]}, expected one or more, all "
            "alike"
        )
    flat = torch.stack([delta.detach().double().flatten() for delta in deltas])  # (M, n)
    return (slerp_coefficients(flat @ flat.T) @ flat).view(deltas[0].shape).float()


def ram(deltas: list[torch.Tensor], threshold: float = 1e-5) -> torch.Tensor:
    """Reinforced agent merging: of each weight, the mean over the runs that moved it.

        sum_m [|d_m| > t] d_m / max(1, sum_m [|d_m| > t])        (RAM, arXiv 2601.13572)

    What one run alone moved is kept whole, where LERP divides it by M. Where all moved, it is LERP.

    Args:
        deltas: M >= 1 task vectors of one shape.
        threshold: t, in the unit of the weights.
    Returns:
        The same shape; float32, or float64 where the task vectors are.
    Raises:
        ValueError: no vector, shapes that differ, or a threshold below 0 or not finite.

    >>> ram([torch.tensor([2.0, 2.0, 0.0]), torch.tensor([0.0, 4.0, 0.0])])
    tensor([2., 3., 0.])
    """
    if not len(deltas) or any(d.shape != deltas[0].shape for d in deltas):
        raise ValueError(
            f"got shapes {[tuple(d.shape) for d in deltas]}, expected one or more, all alike"
        )
    if not 0 <= threshold < math.inf:
        raise ValueError(f"got threshold={threshold}, expected a number of 0 or more")
    stacked = torch.stack(list(deltas)).detach()
    stacked = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
    moved = stacked.abs() > threshold
    return (moved * stacked).sum(0) / moved.sum(0).clamp(min=1)


def task_vector(
    state: dict[str, torch.Tensor], init_state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
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
            raise ValueError(
                f"got {name!r}: {shapes[0]} and {shapes[1]}, expected the same keys and shapes"
            )
    return {
        name: state[name].detach().float() - tensor.detach().float()
        for name, tensor in init_state.items()
        if tensor.is_floating_point()
    }


def liti(
    init_state: dict[str, torch.Tensor], state: dict[str, torch.Tensor], eta: float
) -> dict[str, torch.Tensor]:
    """Linear interpolation towards the initialisation.

        (1 - eta) theta_init + eta theta        (WARP, arXiv 2406.16768: LITI)

    Args:
        init_state, state: state dicts with the same keys and shapes.
        eta: 0 gives theta_init and 1 gives theta, bit for bit; above 1 it extrapolates.
    Returns:
        dict of new tensors in the wider dtype of the two, computed in float32 at least; integer
        and boolean buffers are the init's.
    Raises:
        ValueError: a key or a shape differs; it is named.

    >>> liti({"w": torch.tensor([0.0])}, {"w": torch.tensor([2.0])}, 0.25)
    {'w': tensor([0.5000])}
    """
    for name in dict.fromkeys([*init_state, *state]):
        shapes = [tuple(s[name].shape) if name in s else "missing" for s in (init_state, state)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"got {name!r}: {shapes[0]} and {shapes[1]}, expected the same keys and shapes"
            )
    result = {}
    for name, tensor in init_state.items():
        if tensor.is_floating_point():
            dtype = torch.promote_types(tensor.dtype, state[name].dtype)
            wide = torch.promote_types(dtype, torch.float32)
            mixed = (1 - eta) * tensor.detach().to(wide) + eta * state[name].detach().to(wide)
            result[name] = mixed.to(dtype)
        else:
            result[name] = tensor.clone()
    return result


def group_of(name: str, scope: str) -> str:
    """The group whose angle a tensor shares: the scope of `merge_policies`, in a word.

    >>> group_of("model.layers.3.mlp.up.weight", "layer"), group_of("lm_head.weight", "layer")
    ('model.layers.3', 'lm_head')
    """
    if scope != "layer":
        return name if scope == "tensor" else "model"
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: number + 1] if number is not None else parts[:-1]) or name


@torch.no_grad()
def merge_policies(
    init_state: dict[str, torch.Tensor],
    states: list[dict[str, torch.Tensor]],
    method: str = "slerp",
    scope: str = "layer",
    lam: float | None = None,
    out: dict[str, torch.Tensor] | None = None,
    ram_threshold: float = 1e-5,
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float | list[float] | None]]]:
    """Merge M policies that were trained from one initialisation.

        theta = theta_init + sum_m c_m (theta_m - theta_init)
        (WARP, arXiv 2406.16768; the coefficients c come from the angles of each group)

    A merge of task vectors is a weighted sum of them, and SLERP's weights follow from their dot
    products alone. (RAM's differ from entry to entry.) So there is one pass over the tensors for
    the dot products and one for the sums. Both go block by block: states may be lazy mappings of
    name to tensor, and `out` may write each tensor away. The arithmetic is float32, and float64
    where the difference would show: one policy alone, and vectors within a degree of parallel or
    opposite. Tensors that share their storage in init and states (tied embeddings) count once and
    are merged once.

    Args:
        init_state, states: theta_init and the M >= 1 policies, same keys and shapes, any floating
            dtypes.
        method: "slerp" (the recursion of `slerp_many`), "slerp-symmetric" (mean direction, mean
            norm: no order), "lerp" (mean) or "ram" (see `ram`).
        scope: what shares an angle: "layer" (a transformer block; embeddings, final norm and head
            each by themselves; the paper's), "tensor", or "model" (the whole flattened vector).
        lam: weight of the second of two policies; None is 1/M.
        out: receives the merged tensors by name; None is a new dict.
        ram_threshold: t of `ram`.
    Returns:
        out, each tensor in the widest dtype of its inputs (buffers that are not floating are the
        init's), and a report. It has for each group "angle" (mean over pairs, degrees; None where a
        vector is zero or M = 1), "angles" (of the pairs 1-2, 1-3, ..., 2-3, ...), "norms" (of the M
        task vectors) and "norm" (of the merged one).
    Raises:
        ValueError: a key or shape differs or a weight is not finite (it is named), no states, an
            unknown word, a threshold that `ram` refuses, lam with other than two states, or lam
            with "slerp-symmetric" or "ram".

    >>> init, a, b = ({"w": torch.tensor(w)} for w in ([1.0, 1.0], [2.0, 1.0], [1.0, 2.0]))
    >>> merged, report = merge_policies(init, [a, b])
    >>> merged["w"], report["w"]["angle"]
    (tensor([1.7071, 1.7071]), 90.0)
    """
    if method not in ("slerp", "slerp-symmetric", "lerp", "ram"):
        raise ValueError(f"got method={method!r}, expected slerp, slerp-symmetric, lerp or ram")
    if scope not in ("layer", "tensor", "model"):
        raise ValueError(f"got scope={scope!r}, expected 'layer', 'tensor' or 'model'")
    if not states or (lam is not None and (len(states) != 2 or method not in ("slerp", "lerp"))):
        raise ValueError(
            f"got {len(states)} states, method={method!r} and lam={lam}, expected 1 or more; "
            "lam is for two, and for slerp or lerp"
        )
    every_state = [init_state, *states]
    shapes, *others = [{k: tuple(v.shape) for k, v in state.items()} for state in every_state]
    for m, found in enumerate(others, 1):
        for name in dict.fromkeys([*shapes, *found]):
            if (init := shapes.get(name, "missing")) != (its := found.get(name, "missing")):
                raise ValueError(
                    f"got {name!r}: {init} in the init and {its} in policy {m}, expected the same "
                    "keys and shapes: merge policies of one init"
                )

    # A generator: the name of its type would be one more import.
    def blocks(name: str, dtype: torch.dtype):
        """theta_init (n,) and the task vectors (M, n) of a tensor, block by block.

        A block has few enough elements to stay in the processor's cache.
        """
        flat = [state[name].reshape(-1).split(2**18) for state in every_state]
        for theta_init, *thetas in zip(*flat):
            theta_init = theta_init.to(dtype)
            deltas = theta_init.new_empty(len(states), theta_init.numel())
            for delta, theta in zip(deltas, thetas):
                torch.sub(theta.to(dtype), theta_init, out=delta)
            yield theta_init, deltas

    def dot_products(names: list[str], dtype: torch.dtype) -> torch.Tensor:
        """Of the task vectors of a group, (M, M) in float64."""
        gram = init_state[names[0]].new_zeros(len(states), len(states), dtype=torch.float64)
        for name in names:
            for _, deltas in blocks(name, dtype):
                # Not `deltas @ deltas.T`: its float32 sums are 30 times less exact.
                for m, delta in enumerate(deltas):
                    gram[m, m:] += (delta * deltas[m:]).sum(1)
        return gram.triu() + gram.triu(1).T

    def widest(name: str) -> torch.dtype:
        """The dtype that a tensor is written in: no state is rounded to another's."""
        dtype = init_state[name].dtype
        for state in states:
            dtype = torch.promote_types(dtype, state[name].dtype)
        return dtype

    def cosines(gram: torch.Tensor) -> torch.Tensor:
        """Of the pairs of task vectors, (M (M - 1) / 2,); NaN where one is zero."""
        norms = gram.diagonal().sqrt()
        pairs = torch.triu_indices(len(states), len(states), 1)
        return (gram / (norms[:, None] * norms)).clamp(-1, 1)[tuple(pairs)]

    def coefficients(gram: torch.Tensor) -> torch.Tensor:
        """c (M,) from the dot products of the task vectors (M, M)."""
        if method == "slerp":
            return slerp_coefficients(gram, lam)
        norms = gram.diagonal().sqrt()
        mean = torch.full_like(norms, 1 / len(states))
        weights = mean if lam is None else norms.new_tensor([1 - lam, lam])
        if method == "slerp-symmetric":
            unit = 1 / norms
            length = (unit @ gram @ unit).clamp(min=0).sqrt()  # of the sum of the unit vectors
            if norms.all() and length > 1e-6:
                weights = norms.mean() / length * unit
        return weights

    groups, first_name, tied = {}, {}, []
    # Tied tensors are known by their addresses. A lazy tensor has no lasting one.
    in_memory = all(isinstance(state, dict) for state in every_state)
    for name, shape in shapes.items():
        storages = name
        if in_memory:
            storages = (shape, *(state[name].data_ptr() for state in every_state))
        if storages in first_name:
            tied.append((name, first_name[storages]))
        else:
            first_name[storages] = name
            groups.setdefault(group_of(name, scope), []).append(name)

    out = {} if out is None else out
    report = {}
    for group, names in groups.items():
        floating = [name for name in names if init_state[name].is_floating_point()]
        for name in set(names) - set(floating):
            out[name] = init_state[name].clone()
        if not floating:
            continue
        # float32 does not know the angles of vectors that are too small to square, parallel or
        # opposite: any pair of them, or one and the merge of those before it, whose weights then
        # grow. And a policy that is the whole merge comes back bit for bit.
        exact = len(states) == 1 or lam in (0, 1)
        exact = exact or any(widest(name) == torch.float64 for name in floating)
        for dtype in [torch.float64] if exact else [torch.float32, torch.float64]:
            gram = dot_products(floating, dtype)
            weights = coefficients(gram)
            if weights.abs().max() <= 10 and (cosines(gram).abs() < 1 - 1e-4).all():
                break
        for name in floating if not gram.isfinite().all() else []:
            for m, state in enumerate(every_state):
                if not state[name].isfinite().all():
                    raise ValueError(
                        f"got {name!r} of {f'policy {m}' if m else 'the init'} with numbers that "
                        "are not finite, expected finite ones"
                    )
        square = (weights @ gram @ weights).clamp(min=0) * (method != "ram")
        for name in floating:
            merged = torch.empty(shapes[name], dtype=widest(name), device=gram.device)
            parts = merged.view(-1).split(2**18)
            for part, (theta_init, deltas) in zip(parts, blocks(name, dtype)):
                if method != "ram":
                    delta = weights.to(dtype) @ deltas
                else:
                    delta = ram(deltas, ram_threshold)
                    square += delta.double().square().sum()
                torch.add(theta_init, delta, out=part)
            out[name] = merged
        angles = cosines(gram).acos().rad2deg()
        report[group] = {
            "angle": angles.mean().item() if len(angles) and angles.isfinite().all() else None,
            "angles": [None if angle != angle else angle for angle in angles.tolist()],
            "norms": gram.diagonal().sqrt().tolist(),
            "norm": square.sqrt().item(),
        }
    for name, first in tied:
        out[name] = out[first]
    return out, report
