"""Merging: closed forms, singular cases, scopes, ties, and the command line on saved folders."""

import copy
import itertools
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import minalign.merge as merge_module
from minalign.data import toy
from minalign.merge import (
    ema_update_,
    group_of,
    lerp,
    liti,
    merge_policies,
    ram,
    slerp,
    slerp_coefficients,
    slerp_many,
    task_vector,
)
from minalign.running.errors import UserError
from minalign.tools.merge import main as merge_main
from minalign.tools.task_vectors import angle_summary, with_moves


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def pair_at(angle, norm_a=1.0, norm_b=1.0, size=50, seed=0):
    """Two float64 vectors at exactly that angle, in a random plane."""
    plane, _ = torch.linalg.qr(torch.randn(size, 2, dtype=torch.double, generator=seeded(seed)))
    a, b = plane.T
    return norm_a * a, norm_b * (math.cos(angle) * a + math.sin(angle) * b)


@pytest.mark.parametrize(
    "angle", [1e-7, 1e-4, 1e-2, 0.5, math.pi / 2, 2.0, 3.0, math.pi - 1e-2, math.pi - 1e-4]
)
@pytest.mark.parametrize("lam", [0.3, 0.5, 0.9])
def test_slerp_is_the_closed_form_at_every_angle(device, angle, lam):
    a, b = pair_at(angle, norm_b=1.3)
    expected = (math.sin((1 - lam) * angle) * a + math.sin(lam * angle) * b) / math.sin(angle)
    merged = slerp(a.to(device), b.to(device), lam).cpu().double()
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)


def test_slerp_keeps_the_norm_and_starts_at_a():
    a, b = (v.float() for v in pair_at(1.2))
    for lam in (0.0, 0.3, 0.5, 1.0):
        merged = slerp(a, b, lam)
        assert merged.norm().item() == pytest.approx(1, abs=1e-6)
        assert torch.dot(merged, a).clamp(-1, 1).acos().item() == pytest.approx(lam * 1.2, abs=1e-3)
    assert torch.equal(slerp(a, b, 0), a) and torch.equal(slerp(a, b, 1), b)


@pytest.mark.parametrize(
    ("other", "norm"), [(0.5, 0.791), (0.8, 0.906), (1.0, 1.0), (1.25, 1.132), (2.0, 1.581)]
)
def test_slerp_weighs_raw_task_vectors_so_unequal_norms_do_not_keep_the_norm(other, norm):
    merged = slerp(*pair_at(math.pi / 2, 1.0, other), 0.5)
    assert merged.norm().item() == pytest.approx(norm, abs=1e-3)


def test_singular_pairs_fall_back_on_lerp():
    d = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    torch.testing.assert_close(slerp(d, d, 0.3), d)
    torch.testing.assert_close(slerp(d, -2 * d, 0.5), -0.5 * d)
    torch.testing.assert_close(slerp(d, torch.zeros_like(d), 0.5), 0.5 * d)
    assert not slerp(torch.zeros(3), torch.zeros(3), 0.5).any()
    # One-element tensors are always parallel or opposite: the naive formula gives thousands.
    merged = slerp(torch.tensor([1e-3]), torch.tensor([-1e-3]), 0.5)
    torch.testing.assert_close(merged, torch.tensor([0.0]))


@pytest.mark.parametrize(
    ("count", "weights"),
    [
        (3, [0.612, 0.612, 0.5]),
        (4, [0.566, 0.566, 0.462, 0.383]),
        (5, [0.538, 0.538, 0.439, 0.364, 0.309]),
    ],
)
def test_the_recursion_weighs_orthonormal_vectors_as_the_paper_does(count, weights):
    merged = slerp_many(list(torch.eye(count)))
    torch.testing.assert_close(merged, torch.tensor(weights), atol=6e-4, rtol=0)
    states = [{"w": 1 + row} for row in torch.eye(count)]
    torch.testing.assert_close(merge_policies({"w": torch.ones(count)}, states)[0]["w"] - 1, merged)


@pytest.mark.parametrize("method", ["slerp", "slerp-symmetric", "lerp"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_identical_policies_merge_to_themselves(method, count):
    init, theta = {"w": torch.randn(4, 5)}, {"w": torch.randn(4, 5)}
    torch.testing.assert_close(merge_policies(init, [theta] * count, method)[0]["w"], theta["w"])
    torch.testing.assert_close(slerp_many([theta["w"]] * count), theta["w"])


def test_a_single_policy_is_returned_bit_for_bit():
    init, theta = {"w": torch.randn(999)}, {"w": torch.randn(999)}
    assert torch.equal(merge_policies(init, [theta])[0]["w"], theta["w"])


def llama(seed, tie=True, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config).to(dtype)


def fine_tuned(model, seed, scale=0.01):
    model, generator = copy.deepcopy(model), seeded(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * scale
        noise = noise * (1 + parameter.numel() % 3)  # some tensors move further than others
        parameter.data.add_(noise.to(parameter.dtype))
    return model


def flat(state, names):
    return torch.cat([state[name].detach().double().flatten() for name in names])


@pytest.mark.parametrize("scope", ["layer", "tensor", "model"])
def test_each_group_is_merged_by_its_own_angle(scope):
    """Against slerp on the concatenated group, and an identity.

    At lam = 1/2, SLERP = LERP / cos(angle / 2).
    """
    start = llama(0)
    init = dict(start.named_parameters())
    thetas = [dict(fine_tuned(start, seed).named_parameters()) for seed in (1, 2)]
    merged, report = merge_policies(init, thetas, scope=scope)
    groups = {}
    for name in init:
        in_layer = ".layers." in name
        layer = ".".join(name.split(".")[:3]) if in_layer else name.removesuffix(".weight")
        group = {"layer": layer, "tensor": name, "model": "model"}[scope]
        groups.setdefault(group, []).append(name)
    assert set(report) == set(groups)
    # 2 layers, embedding, final norm
    assert len(groups) == {"layer": 4, "tensor": len(init), "model": 1}[scope]
    for group, names in groups.items():
        a, b = (flat(theta, names) - flat(init, names) for theta in thetas)
        delta = flat(merged, names) - flat(init, names)
        torch.testing.assert_close(delta, slerp(a, b, 0.5).double(), atol=2e-7, rtol=1e-4)
        angle = math.acos(torch.dot(a, b) / a.norm() / b.norm())
        # dot products in float32
        assert report[group]["angle"] == pytest.approx(math.degrees(angle), abs=1e-4)
        assert report[group]["norms"] == pytest.approx([a.norm().item(), b.norm().item()])
        from_lerp = lerp(a, b, 0.5).double() / math.cos(angle / 2)
        torch.testing.assert_close(delta, from_lerp, atol=2e-7, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1e15])
@pytest.mark.parametrize("angle", [1e-4, 0.5, 2.0, 3.1, math.pi - 1e-4, math.pi])
def test_merging_states_is_slerp_at_every_angle_and_size(device, angle, scale):
    """In float32 as in float64.

    The states' merge takes float64 near the singular angles, and where squares leave float32's
    range.
    """
    a, b = (v.float() * scale for v in pair_at(angle, norm_b=3.0))
    init = {"w": torch.zeros_like(a, device=device)}
    merged, report = merge_policies(init, [{"w": a.to(device)}, {"w": b.to(device)}])
    torch.testing.assert_close(merged["w"].cpu(), slerp(a, b, 0.5), rtol=1e-4, atol=1e-4 * scale)
    # float32 weights do not know it better
    assert report["w"]["angle"] == pytest.approx(math.degrees(angle), abs=2e-3)
    assert report["w"]["norms"] == pytest.approx([scale, 3 * scale], rel=1e-5)


def test_angles_of_many_elements_are_exact():
    """Sums of a million float32 products, taken one after the other, would be off by some 1e-6."""
    torch.manual_seed(0)
    a = torch.randn(2**20)
    b = 2 * a + torch.randn(2**20)
    _, report = merge_policies({"w": torch.zeros_like(a)}, [{"w": a}, {"w": b}])
    a, b = a.double(), b.double()
    angle = math.degrees(math.acos(a @ b / a.norm() / b.norm()))
    assert report["w"]["angle"] == pytest.approx(angle, abs=1e-5)
    assert report["w"]["norms"] == pytest.approx([a.norm().item(), b.norm().item()], rel=1e-7)


@pytest.mark.parametrize("sizes", [(2**18 + 5, 3), (3, 2**18), (2**19 + 1, 1)])
def test_merges_of_several_blocks_are_the_recursion_on_the_whole_vector(device, sizes):
    """Unequal norms and angles, so that no dot product can stand for another."""
    torch.manual_seed(0)
    init = {f"layers.0.{i}": torch.randn(size) for i, size in enumerate(sizes)}
    common = torch.randn(sum(sizes))
    deltas = [c * common + n * torch.randn(sum(sizes)) for c, n in ((0.1, 0.2), (0.3, 0.1), (0, 1))]
    parts = [delta.split(sizes) for delta in deltas]
    states = [dict(zip(init, map(torch.add, init.values(), part))) for part in parts]
    on_device = [{k: v.to(device) for k, v in state.items()} for state in (init, *states)]
    merged, report = merge_policies(on_device[0], on_device[1:])
    deltas = [flat(state, init) - flat(init, init) for state in states]
    found = flat({name: tensor.cpu() for name, tensor in merged.items()}, init)
    torch.testing.assert_close(
        found - flat(init, init), slerp_many(deltas).double(), rtol=0, atol=1e-6
    )
    assert report["layers.0"]["norms"] == pytest.approx([d.norm().item() for d in deltas], rel=1e-7)
    pairs = [(deltas[i], deltas[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    angles = [math.degrees(math.acos(a @ b / a.norm() / b.norm())) for a, b in pairs]
    assert report["layers.0"]["angle"] == pytest.approx(sum(angles) / 3, abs=1e-5)


def test_a_third_policy_opposite_to_the_merge_of_two_does_not_blow_up():
    """No two of them are opposite, but the weights that float32 would give are thousands."""
    for seed in range(10):
        a, b = (v.float() for v in pair_at(1.0, size=5000, seed=seed))
        deltas = [a, b, -1.7 * slerp(a, b, 0.5)]
        merged, _ = merge_policies({"w": torch.zeros_like(a)}, [{"w": delta} for delta in deltas])
        torch.testing.assert_close(merged["w"], slerp_many(deltas))
    a, b = (v.float() for v in pair_at(2 * math.pi / 3))
    states = [{"w": a}, {"w": b}, {"w": -a - b}]
    merged, _ = merge_policies({"w": torch.zeros_like(a)}, states, "slerp-symmetric")
    assert merged["w"].norm() < 1e-6  # no mean direction: the mean


def test_ends_of_the_path_are_the_policies_bit_for_bit():
    init, a, b = ({"w": torch.randn(999)} for _ in range(3))
    for lam, end in ((0.0, a), (1.0, b)):
        assert torch.equal(merge_policies(init, [a, b], lam=lam)[0]["w"], end["w"])


def test_scopes_agree_on_one_tensor_and_differ_on_two():
    def merged(states, scope):
        return next(iter(merge_policies(states[0], states[1:], scope=scope)[0].values()))

    one = [{"w": torch.randn(6)} for _ in range(3)]
    torch.testing.assert_close(merged(one, "layer"), merged(one, "tensor"))
    torch.testing.assert_close(merged(one, "layer"), merged(one, "model"))
    two = [{"layers.0.a": torch.randn(6), "layers.0.b": torch.randn(6)} for _ in range(3)]
    assert not torch.allclose(merged(two, "tensor"), merged(two, "layer"), atol=1e-3)


def test_lam_is_the_weight_of_the_second_policy():
    """At .5 a reversal could not be seen."""
    init, states = {"w": torch.zeros(2)}, [{"w": row} for row in torch.eye(2)]
    expected = torch.tensor([math.sin(0.7 * math.pi / 2), math.sin(0.3 * math.pi / 2)])
    torch.testing.assert_close(merge_policies(init, states, lam=0.3)[0]["w"], expected)
    by_lerp = merge_policies(init, states, "lerp", lam=0.3)[0]["w"]
    torch.testing.assert_close(by_lerp, torch.tensor([0.7, 0.3]))


def test_symmetric_slerp_knows_no_order_and_the_recursion_does():
    init = {"w": torch.zeros(8)}
    states = [{"w": torch.randn(8, generator=seeded(seed))} for seed in range(3)]
    orders = (states, states[::-1])
    one, other = (merge_policies(init, order, "slerp-symmetric")[0]["w"] for order in orders)
    torch.testing.assert_close(one, other)
    unit = sum(state["w"] / state["w"].norm() for state in states)
    norm = sum(state["w"].norm() for state in states) / 3
    torch.testing.assert_close(one, unit / unit.norm() * norm)
    one, other = (merge_policies(init, order)[0]["w"] for order in orders)
    assert not torch.allclose(one, other, atol=1e-3)


def test_merging_task_vectors_is_not_merging_weights():
    """SLERP of whole weights is about LERP: the update would shrink to .7."""
    init = {"w": torch.ones(1000)}
    deltas = [torch.randn(1000, generator=seeded(seed)) * 0.01 for seed in (0, 1)]
    merged = merge_policies(init, [{"w": 1 + delta} for delta in deltas])[0]["w"] - 1
    assert merged.norm().item() == pytest.approx(deltas[0].norm().item(), rel=0.1)


def test_bfloat16_states_are_merged_in_float32():
    init = {"w": torch.randn(4096).bfloat16()}
    states = [{"w": (init["w"].float() + 0.01 * torch.randn(4096)).bfloat16()} for _ in range(2)]
    merged, _ = merge_policies(init, states)
    init_32, *states_32 = [{"w": state["w"].float()} for state in (init, *states)]
    upcast, _ = merge_policies(init_32, states_32)
    assert merged["w"].dtype == torch.bfloat16
    assert torch.equal(merged["w"], upcast["w"].bfloat16())
    assert task_vector(states[0], init)["w"].dtype == torch.float32


def test_tied_weights_count_once():
    models = [llama(0), fine_tuned(llama(0), 1), fine_tuned(llama(0), 2)]
    init, *states = (model.state_dict() for model in models)
    merged, report = merge_policies(init, states, scope="model")
    for state in (init, *states):
        del state["lm_head.weight"]
    _, expected = merge_policies(init, states, scope="model")
    assert report["model"]["angle"] == expected["model"]["angle"]
    assert merged["lm_head.weight"] is merged["model.embed_tokens.weight"]


def test_buffers_are_the_inits_and_inputs_stay_as_they_are():
    init = {"w": torch.randn(5), "steps": torch.tensor([299]), "flag": torch.tensor([True])}
    states = [
        {"w": torch.randn(5), "steps": torch.tensor([300]), "flag": torch.tensor([False])}
        for _ in range(2)
    ]
    before = copy.deepcopy([init, *states])
    for result in (merge_policies(init, states)[0], liti(init, states[0], 0.5)):
        assert result["steps"].item() == 299
        assert result["steps"].dtype == torch.int64
        assert result["flag"].item()
        result["w"].zero_()
        result["steps"].zero_()
    for state, kept in zip([init, *states], before):
        assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_liti_ends_are_exact():
    init, theta = ({"w": torch.randn(1000)} for _ in range(2))
    assert torch.equal(liti(init, theta, 0.0)["w"], init["w"])
    assert torch.equal(liti(init, theta, 1.0)["w"], theta["w"])
    torch.testing.assert_close(liti(init, theta, 0.3)["w"], 0.7 * init["w"] + 0.3 * theta["w"])


def test_ema_follows_its_closed_form_in_float32_under_a_bfloat16_model():
    policy = llama(0, dtype=torch.bfloat16)
    ema = copy.deepcopy(policy).float()
    init = {name: p.detach().double() for name, p in ema.named_parameters()}
    moved = fine_tuned(policy, seed=1, scale=0.1)
    for _ in range(200):
        # Through state_dict, where the tied embedding is listed twice: it must move once.
        ema_update_(list(ema.state_dict().values()), list(moved.state_dict().values()), mu=0.01)
    averages = dict(ema.named_parameters())
    for name, parameter in moved.named_parameters():
        theta = parameter.detach().double()
        expected = theta - (1 - 0.01) ** 200 * (theta - init[name])
        average = averages[name].detach().double()
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-5)


def test_bad_merges_are_refused_by_name():
    init, state = ({"a": torch.ones(2), "b": torch.ones(3)} for _ in range(2))
    for broken in ({"a": torch.ones(2)}, init | {"c": torch.ones(1)}, init | {"b": torch.ones(4)}):
        with pytest.raises(ValueError, match="'[bc]'"):
            merge_policies(init, [state, broken])
        with pytest.raises(ValueError, match="'[bc]'"):
            liti(init, broken, 0.5)
        with pytest.raises(ValueError, match="'[bc]'"):
            task_vector(broken, init)
    for arguments in (
        ([], "slerp"),
        ([state], "mean"),
        ([state, state, state], "slerp", "layer", 0.3),
        ([state], "slerp", "block"),
    ):
        with pytest.raises(ValueError, match="expected"):
            merge_policies(init, *arguments)
    with pytest.raises(ValueError, match="float32"):
        ema_update_([torch.zeros(2).bfloat16()], [torch.ones(2)], 0.1)
    with pytest.raises(ValueError, match="storage"):
        ema_update_([init["a"]], [init["a"]], 0.1)
    with pytest.raises(ValueError, match="mu"):
        ema_update_([init["a"]], [state["a"]], 0.0)


@pytest.fixture
def saved(tmp_path):
    """Three saved models of the toy size, the second policy in several shards."""
    tokenizer = toy.make_tokenizer()
    start = toy.make_model(tokenizer, seed=0)
    models = {"init": start, "b": fine_tuned(start, 1), "c": fine_tuned(start, 2)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name, max_shard_size="100KB" if name == "c" else "5GB")
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "init" / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path, models


def merge(folder, names, *more):
    """`python -m minalign merge` of the named models into `merged`."""
    models = [f"{folder}/{name}" for name in names.split()]
    merge_main(
        ["--init", f"{folder}/init", "--models", *models, "--out", f"{folder}/merged", *more]
    )


@pytest.mark.parametrize("shard_bytes", [2**27, 50_000])
def test_merging_folders_equals_merging_in_memory_bit_for_bit(saved, monkeypatch, shard_bytes):
    folder, models = saved
    monkeypatch.setattr("minalign.tools.shards.SHARD_BYTES", shard_bytes)
    merge(folder, "b c")
    init, *states = (models[name].state_dict() for name in ("init", "b", "c"))
    expected, report = merge_policies(init, states)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert (folder / "merged" / "model.safetensors.index.json").exists() == (shard_bytes < 2**27)
    assert (folder / "merged" / "chat_template.jinja").exists()
    written = json.loads((folder / "merged" / "angles.json").read_text())
    assert written.keys() == {"total"} | report.keys()
    assert all(report[group].items() <= written[group].items() for group in report)


def test_merging_folders_moves_by_eta(saved):
    folder, models = saved
    merge(folder, "b", "--eta", "0.25")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    expected = liti(models["init"].state_dict(), models["b"].state_dict(), 0.25)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())


def test_folders_that_do_not_belong_together_are_refused_and_nothing_is_left(saved):
    folder, models = saved
    tokenizer = toy.make_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(folder / "b")
    with pytest.raises(UserError, match="tokenizer"):
        merge(folder, "b")
    models["init"].resize_token_embeddings(50)
    models["init"].save_pretrained(folder / "c", max_shard_size="100KB")
    with pytest.raises(UserError, match="embed_tokens"):
        merge(folder, "c")
    with pytest.raises(UserError, match="none"):
        merge(folder, "none")
    assert not (folder / "merged").exists()


# --- coefficients --------------------------------------------------------------------------------


def recursion(deltas, lam=None):
    """Equation 26 on the vectors themselves, one after the other, in float64."""
    merged = deltas[0]
    for m, delta in enumerate(deltas[1:], 2):
        weight = 1 / m if lam is None else lam
        cosine = (merged @ delta) / (merged.norm() * delta.norm())
        angle = cosine.clamp(-1, 1).acos()
        if angle.sin() < 1e-6:
            merged = (1 - weight) * merged + weight * delta
        else:
            first, second = ((1 - weight) * angle).sin(), (weight * angle).sin()
            merged = (first * merged + second * delta) / angle.sin()
    return merged


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_coefficients_from_dot_products_are_those_of_the_recursion(count):
    deltas = torch.randn(count, 40, dtype=torch.double) + 0.5
    weights = slerp_coefficients(deltas @ deltas.T)
    assert weights.dtype == torch.double and weights.shape == (count,)
    torch.testing.assert_close(weights @ deltas, recursion(deltas), rtol=1e-10, atol=1e-12)


def test_lam_is_the_weight_of_the_later_vector():
    deltas = torch.randn(2, 40, dtype=torch.double)
    for lam in (0.0, 0.2, 0.5, 1.0):
        weights = slerp_coefficients(deltas @ deltas.T, lam)
        torch.testing.assert_close(weights @ deltas, recursion(deltas, lam))
    assert slerp_coefficients(deltas @ deltas.T, 0.0).tolist() == [1.0, 0.0]
    assert slerp_coefficients(deltas @ deltas.T, 1.0)[1] == 1.0


@pytest.mark.parametrize("second", [2.0, -1.0, 0.0])
def test_where_there_is_no_arc_the_coefficients_are_those_of_lerp(second):
    """Parallel, opposite, zero."""
    a = torch.randn(40, dtype=torch.double)
    deltas = torch.stack([a, second * a])
    assert slerp_coefficients(deltas @ deltas.T, 0.3).tolist() == [0.7, 0.3]


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 0)])
def test_coefficients_need_a_square_of_dot_products(shape):
    with pytest.raises(ValueError, match="expected \\(M, M\\)"):
        slerp_coefficients(torch.zeros(shape, dtype=torch.double))


def test_slerp_slerp_many_and_merge_policies_take_the_same_coefficients(monkeypatch):
    """What the equation table names is what runs."""
    calls, real = [], merge_module.slerp_coefficients

    def recorded(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(merge_module, "slerp_coefficients", recorded)
    a, b = torch.randn(4, 5), torch.randn(4, 5)
    merged, _ = merge_policies({"w": torch.zeros(4, 5)}, [{"w": a}, {"w": b}])
    for other in (slerp(a, b, 0.5), slerp_many([a, b])):
        torch.testing.assert_close(merged["w"], other, rtol=1e-5, atol=1e-6)
    assert len(calls) >= 3


# --- RAM, and what the runs moved -----------------------------------------------------------------


def test_ram_by_hand():
    """t = .5. Nobody moved the first, one alone the next two, two the next three, all the last."""
    a = torch.tensor([0.5, 2.0, 0.25, 1.0, 3.0, 0.0, 1.0])
    b = torch.tensor([-0.5, 0.0, 0.0, 3.0, -1.0, -4.0, 2.0])
    c = torch.tensor([0.0, 0.5, -0.75, 0.5, 0.0, 2.0, 6.0])
    by_hand = torch.tensor([0.0, 2.0, -0.75, 2.0, 1.0, -1.0, 3.0])
    assert torch.equal(ram([a, b, c], 0.5), by_hand)
    merged, report = merge_policies(
        {"w": torch.ones(7)}, [{"w": 1 + d} for d in (a, b, c)], "ram", ram_threshold=0.5
    )
    assert torch.equal(merged["w"], 1 + by_hand)
    assert report["w"]["norm"] == pytest.approx(by_hand.norm().item())


def test_ram_of_what_all_moved_is_lerp_and_of_disjoint_vectors_the_sum():
    a, b = torch.randn(99, generator=seeded(1)), torch.randn(99, generator=seeded(2))
    torch.testing.assert_close(ram([a, b]), lerp(a, b, 0.5))
    even = torch.arange(99) % 2
    assert torch.equal(ram([a * even, b * (1 - even)]), a * even + b * (1 - even))
    assert torch.equal(ram([a], 0.5), a * (a.abs() > 0.5))
    assert torch.equal(ram([a, b], 0), ram([b, a], 0)) and not ram([a * 0, b * 0], 0).any()
    assert ram([a.double(), b.double()]).dtype == torch.float64
    assert ram([a.bfloat16(), b.bfloat16()]).dtype == torch.float32
    assert ram([a / 0, b])[a != 0].isinf().all() and ram([a * math.nan, b]).isnan().all()


@pytest.mark.parametrize(
    "count, dtype, size",
    [
        (1, torch.float32, 99),
        (2, torch.bfloat16, 99),
        (3, torch.float64, 99),
        (3, torch.float32, 2**18 + 5),
    ],
)
def test_ram_of_states_goes_weight_by_weight_whatever_shares_an_angle(count, dtype, size, device):
    sizes = {"model.layers.0.w": size, "model.layers.0.b": 3, "head": 7}
    init = {n: torch.randn(s, device=device).to(dtype) for n, s in sizes.items()}
    states = []
    for m in range(count):
        moved = {n: (torch.rand(s, generator=seeded(m)) < 0.3) for n, s in sizes.items()}
        states.append({n: init[n] + moved[n].to(init[n]) for n in init})
    for scope in ("layer", "model"):
        merged, report = merge_policies(init, states, "ram", scope, ram_threshold=1e-3)
        square = 0.0
        for name in init:
            deltas = [state[name].float() - init[name].float() for state in states]
            count_here = sum((delta.abs() > 1e-3).int() for delta in deltas)
            expected = sum(deltas) / count_here.clamp(min=1)  # what is not moved here is 0
            torch.testing.assert_close(
                merged[name].float(), (init[name].float() + expected).to(dtype).float()
            )
            square += expected.double().square().sum().item()
        assert math.hypot(*(one["norm"] for one in report.values())) == pytest.approx(square**0.5)


def test_bad_ram_is_refused():
    one, two = torch.ones(2), torch.ones(3)
    for deltas, threshold in [([], 0), ([one, two], 0), ([one], -1), ([one], math.nan)]:
        with pytest.raises(ValueError, match="expected"):
            ram(deltas, threshold)
    with pytest.raises(ValueError, match="lam is for two, and for slerp or lerp"):
        merge_policies({"w": one}, [{"w": one}] * 2, "ram", lam=0.5)
    with pytest.raises(ValueError, match="threshold"):
        merge_policies({"w": one}, [{"w": one}] * 2, "ram", ram_threshold=math.inf)
    with pytest.raises(ValueError, match="not finite"):
        merge_policies({"w": one}, [{"w": one}, {"w": one * math.nan}], "ram")


@pytest.mark.slow
def test_ram_is_mergekits():
    """With mergekit 0.1.5, of three policies, bit for bit but for the order of a sum."""
    module = pytest.importorskip("mergekit.merge_methods.ram")
    base, *thetas = (torch.randn(500, generator=seeded(m)) for m in range(4))
    thetas = [torch.where(theta > 0, theta, base) for theta in thetas]
    deltas = [theta - base for theta in thetas]
    flat, moved, counts, shared, alone = module._prepare_ram_vectors(thetas, base, 1e-5)
    theirs = (flat * moved * alone + flat * moved * shared / counts.clamp(min=1)).sum(0)
    torch.testing.assert_close(ram(deltas), theirs, rtol=1e-6, atol=1e-7)


def table(deltas, threshold):
    """What runs moved, entry by entry, in plain Python: shares moved, overlap, sign agreement."""
    entries = [[value for value in entry if abs(value) > threshold] for entry in zip(*deltas)]
    moved = [sum(abs(value) > threshold for value in delta) / len(delta) for delta in deltas]
    any_ = [entry for entry in entries if entry]
    several = [entry for entry in any_ if len(entry) > 1]
    alike = [entry for entry in several if min(entry) > 0 or max(entry) < 0]
    overlap = len(several) / len(any_) if any_ else None
    return moved, overlap, len(alike) / len(several) if several else None


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("scope", ["layer", "tensor", "model"])
def test_the_report_counts_what_each_run_moved_per_group_and_in_total(count, scope):
    names = ["model.embed.weight", "model.layers.0.q", "model.layers.0.k", "model.layers.1.q"]
    init = {name: torch.randn(40 + i, generator=seeded(i)) for i, name in enumerate(names)}
    init |= {"model.still": torch.ones(3), "mask": torch.ones(2, dtype=torch.bool)}
    states = [dict(init) for _ in range(count)]
    for m, state in enumerate(states):
        for i, name in enumerate(names):
            noise = torch.randn(40 + i, generator=seeded(100 * m + i))
            state[name] = init[name] + noise.where(noise > -1, torch.zeros(()))
    report = merge_policies(init, states, "lerp", scope)[1]
    described = with_moves(report, init, states, scope, 0.25)
    groups = {
        group: [n for n in names + ["model.still"] if group_of(n, scope) == group]
        for group in report
    }
    assert list(described) == ["total", *report]
    for group, members in {"total": names + ["model.still"], **groups}.items():
        vectors = torch.stack([flat(state, members) - flat(init, members) for state in states])
        moved, overlap, agreement = table(vectors.tolist(), 0.25)
        found = described[group]
        assert found["moved"] == moved and found["weights"] == vectors.shape[1]
        assert (found["overlap"], found["sign_agreement"]) == (overlap, agreement)
        assert found["norms"] == pytest.approx(vectors.norm(dim=1).tolist())
        assert found["norm"] == pytest.approx(vectors.mean(0).norm().item())
        pairs = itertools.combinations(vectors, 2)
        angles = [math.degrees(math.acos(a @ b / a.norm() / b.norm())) for a, b in pairs if a.any()]
        if "still" in members[0]:
            assert found["angle"] is None and found["overlap"] is None
        else:
            assert found["angles"] == pytest.approx(angles, abs=1e-3)
    text = angle_summary(described)
    assert f"{described['total']['moved'][0]:.1%}" in text and "\n" not in text


def test_of_large_tensors_a_part_tells_what_was_moved():
    """And small ones are looked at whole, and weigh what they have: not 32 times as much."""
    size, small = 2**17 + 9, 2**14
    init = {"large": torch.zeros(size), "small": torch.zeros(small)}
    draws = [torch.rand(size, generator=seeded(m)) < share for m, share in ((0, 0.25), (1, 0.5))]
    states = [{"large": draw * 1.0, "small": torch.ones(small)} for draw in draws]
    report = merge_policies(init, states, "lerp")[1]
    exact, sampled = (with_moves(report, init, states, "layer", 1e-5, part) for part in (1, 32))
    for group in exact:
        assert sampled[group]["moved"] == pytest.approx(exact[group]["moved"], abs=0.03)
        assert sampled[group]["overlap"] == pytest.approx(exact[group]["overlap"], abs=0.03)
        assert sampled[group]["weights"] == exact[group]["weights"]
    assert sampled["small"] == exact["small"] and sampled["large"] != exact["large"]
    shares = [(draw.sum().item() + small) / (size + small) for draw in draws]
    assert exact["total"]["moved"] == pytest.approx(shares, abs=1e-12)


def test_merging_folders_by_ram(saved, capsys):
    folder, models = saved
    merge(folder, "b c", "--method", "ram", "--ram-threshold", "0.02")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").state_dict()
    start, *thetas = (models[name].state_dict() for name in ("init", "b", "c"))
    for name, weight in start.items():
        delta = ram([theta[name] - weight for theta in thetas], 0.02)
        torch.testing.assert_close(merged[name], weight + delta)
    total = json.loads((folder / "merged" / "angles.json").read_text())["total"]
    assert "moved by more than 0.02: " in capsys.readouterr().out and 0 < total["overlap"] < 1
    for wrong in ("--lam 0.5", "--ram-threshold -1", "--ram-threshold nan"):
        with pytest.raises((UserError, SystemExit)):
            merge(folder, "c b", "--method", "ram", *wrong.split())
