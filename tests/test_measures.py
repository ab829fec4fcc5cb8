"""Measures of generalization: each against a slow twin on small networks, invariances, registry, refusals."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from specprune.analysis.cushions import cushions
from specprune.analysis.layer_norms import LayerMatrix
from specprune.analysis.measured_network import MeasuredNetwork
from specprune.analysis.measures import MEASURES, find_measures, measure_table, network_measures
from specprune.analysis.prunability import prunability
from specprune.analysis.tightness import bound_table
from specprune.bounds.occam import occam_bound
from specprune.compress.coding import fold_batch_norms

SAMPLES = 60
CHEAP = [m.name for m in MEASURES.values() if m.cost in ("weights", "pass") and m.name != "log_noise_stability"]


def mlp(*widths: int, seed: int = 0, bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after, bias=bias), nn.ReLU()]
        return nn.Sequential(*layers[:-1]).eval()


def convnet(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            *(nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        )
        with torch.no_grad():
            for norm in (net[1], net[5]):
                norm.running_mean.normal_(0, 0.1)
                norm.running_var.uniform_(0.5, 2)
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.1)
        return net.eval()


def case(model: nn.Module, shape: tuple[int, ...], start: nn.Module | None = None, seed: int = 0) -> MeasuredNetwork:
    """A network whose own answers are the labels, so that every margin is positive."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(SAMPLES, *shape, generator=generator)
    with torch.no_grad():
        targets = model(inputs).argmax(1)
    return MeasuredNetwork(model, inputs, targets, start=start)


def value(name: str, net: MeasuredNetwork) -> float:
    return MEASURES[name](net)


def slow_values(net: MeasuredNetwork) -> dict[str, float]:
    """Every norm measure from its formula, by loops over NumPy matrices of the layers as they are in the module."""
    layers = [module for module in net.model if isinstance(module, nn.Linear)]
    starts = [module for module in net.start if isinstance(module, nn.Linear)]
    w = [layer.weight.detach().double().numpy() for layer in layers]
    v = [layer.weight.detach().double().numpy() for layer in starts]
    b = [layer.bias.detach().double().numpy() for layer in layers]
    c = [layer.bias.detach().double().numpy() for layer in starts]
    m, d = len(net.inputs), len(w)
    logits = net.model.double()(net.inputs.double()).detach().numpy()
    net.model.float()
    gaps = []
    for row, label in zip(logits, net.targets.numpy(), strict=True):
        gaps.append(row[label] - max(x for k, x in enumerate(row) if k != label))
    gamma = float(np.percentile(gaps, 10))
    spec = [math.sqrt(np.linalg.eigvalsh(a.T @ a)[-1]) for a in w]
    fro = [math.sqrt((a * a).sum()) for a in w]
    moved = [math.sqrt(((a - e) ** 2).sum()) for a, e in zip(w, v, strict=True)]
    moved_spec = [math.sqrt(np.linalg.eigvalsh((a - e).T @ (a - e))[-1]) for a, e in zip(w, v, strict=True)]
    everything = np.concatenate([x.ravel() for x in (*w, *b)])
    before = np.concatenate([x.ravel() for x in (*v, *c)])
    prod_spec, prod_fro = math.prod(s * s for s in spec), math.prod(f * f for f in fro)

    def half(x: float) -> float:
        return 0.5 * (math.log(x) - math.log(m))

    paths = np.ones(net.inputs[0].numel())
    for a, shift in zip(w, b, strict=True):
        paths = (a * a) @ paths + shift * shift
    path = paths.sum()
    alpha = math.sqrt(d + math.log(net.inputs[0].numel()))
    one_inf = math.prod(max(np.abs(row).sum() for row in a) for a in w)
    l3 = math.prod(sum((np.abs(row) ** 3).sum() ** (1.5 / 3) for row in a) ** (1 / 1.5) for a in w)
    rows = [sum(math.sqrt((row**2).sum()) for row in a - e) for a, e in zip(w, v, strict=True)]
    bartlett = sum((r / s) ** (2 / 3) for r, s in zip(rows, spec, strict=True)) ** 1.5
    heights = sum(len(a) * (f / s) ** 2 for a, f, s in zip(w, moved, spec, strict=True))
    main = sum((f / s) ** 2 for f, s in zip(moved, spec, strict=True))
    plain = sum((f / s) ** 2 for f, s in zip(fro, spec, strict=True))
    twins = {
        "params": math.sqrt(len(everything) / m),
        "l2": math.sqrt(math.sqrt((everything**2).sum()) / m),
        "l2_dist": math.sqrt(math.sqrt(((everything - before) ** 2).sum()) / m),
        "inverse_margin": math.sqrt(1 / gamma**2 / m),
        "log_prod_of_spec": half(prod_spec),
        "log_prod_of_spec_over_margin": half(prod_spec / gamma**2),
        "log_spec_init_main": half(prod_spec / gamma**2 * main),
        "log_spec_orig_main": half(prod_spec / gamma**2 * plain),
        "fro_over_spec": math.sqrt(plain / m),
        "log_sum_of_spec": half(d * prod_spec ** (1 / d)),
        "log_sum_of_spec_over_margin": half(d * (prod_spec / gamma**2) ** (1 / d)),
        "log_prod_of_fro": half(prod_fro),
        "log_prod_of_fro_over_margin": half(prod_fro / gamma**2),
        "log_sum_of_fro": half(d * prod_fro ** (1 / d)),
        "log_sum_of_fro_over_margin": half(d * (prod_fro / gamma**2) ** (1 / d)),
        "fro_dist": math.sqrt(sum(f * f for f in moved) / m),
        "dist_spec_init": math.sqrt(sum(s * s for s in moved_spec) / m),
        "param_norm": math.sqrt(sum(f * f for f in fro) / m),
        "log_path_norm": half(path),
        "log_path_norm_over_margin": half(path / gamma**2),
        "log_l1_inf_norms": math.log(alpha * one_inf / gamma / math.sqrt(m)),
        "log_frobenius_norms": math.log(alpha * math.sqrt(prod_fro) / gamma / math.sqrt(m)),
        "log_l3_norms": math.log(alpha * l3 / gamma / m ** (1 / 3)),
        "log_bartlett": math.log(math.sqrt(prod_spec) * bartlett / gamma / math.sqrt(m)),
        "log_neyshabur": math.log(d * math.sqrt(prod_spec) * math.sqrt(heights) / gamma / math.sqrt(m)),
    }
    same = [name for name in MEASURES if name.endswith("_fft")]  # a matrix is its own map of images
    return twins | {name: twins[name.removesuffix("_fft")] for name in same}


@pytest.mark.parametrize("widths", [(4, 5, 3), (6, 5, 4, 3)])
def test_norm_measures_are_their_formulas(widths: tuple[int, ...]) -> None:
    net = case(mlp(*widths), widths[:1], start=mlp(*widths, seed=9))
    twins = slow_values(net)
    assert set(twins) == {m.name for m in MEASURES.values() if m.source.startswith(("Jiang", "Neysh", "Bartl"))} - {
        name for name in MEASURES if name.startswith("pacbayes")
    }
    for name, wanted in twins.items():
        assert value(name, net) == pytest.approx(wanted, rel=2e-6), name


def test_path_norm_enumerates_all_paths() -> None:
    net = case(mlp(3, 4, 2), (3,))
    (u, p), (v, q) = (
        (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()) for layer in net.model[1::2]
    )
    total = sum((u[j, i] * v[k, j]) ** 2 for i in range(3) for j in range(4) for k in range(2))
    total += sum((p[j] * v[k, j]) ** 2 for j in range(4) for k in range(2)) + sum(q**2)
    assert value("log_path_norm", net) == pytest.approx(0.5 * math.log(total / SAMPLES), rel=1e-9)


def test_batch_norms_are_folded_first() -> None:
    model = convnet()
    plain = case(model, (1, 6, 6), start=convnet(seed=5))
    hand = copy.deepcopy(model)
    with torch.no_grad():  # each norm's scale and shift multiplied into the convolution before it
        for at in (0, 4):
            conv, norm = hand[at], hand[at + 1]
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            folded = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1)
            folded.weight.copy_(conv.weight * scale[:, None, None, None])
            folded.bias.copy_(norm.bias - norm.running_mean * scale)
            hand[at], hand[at + 1] = folded, nn.Identity()
    other = MeasuredNetwork(hand.eval(), plain.inputs, plain.targets, start=plain.folded_start)
    for name in CHEAP:
        if MEASURES[name].needs != "population":
            assert value(name, other) == pytest.approx(value(name, plain), rel=1e-4), name


def test_fft_measures_take_the_norm_of_the_map_of_images() -> None:
    net = case(convnet(), (1, 6, 6))
    layers = list(fold_batch_norms(net.model, net.data).children())
    dense = []
    for layer, shape in ((layers[0], (1, 6, 6)), (layers[4], (3, 3, 3))):
        eye = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
        rows = nn.functional.conv2d(eye, layer.weight.detach().double(), padding=1).flatten(1)
        dense.append(float(np.linalg.norm(rows.numpy(), 2)))
    for exact, given_norm in zip(dense, net.map_norms, strict=False):  # circular instead of zero padding: from above
        assert exact <= given_norm * (1 + 1e-9)
        assert given_norm < 1.5 * exact
    assert net.map_norms[0] == LayerMatrix(net.matrices[0], layers[0], (1, 6, 6)).operator_norm()
    last = np.linalg.norm(layers[-1].weight.detach().double().numpy(), 2)
    wanted = 0.5 * (2 * sum(math.log(x) for x in (*net.map_norms[:2], last)) - math.log(SAMPLES))
    assert value("log_prod_of_spec_fft", net) == pytest.approx(wanted, rel=1e-6)


def test_spectral_measures_from_activations() -> None:
    net = case(mlp(6, 8, 7, 3), (6,))
    x = net.inputs.double()
    work = copy.deepcopy(net.model).double()
    covariances = []
    for index, module in enumerate(work):
        x = module(x)
        if isinstance(module, nn.ReLU):
            covariances.append((x.T @ x / len(x)).detach().numpy())
        del index
    dofs, ranks, tails = {}, 0.0, 0.0
    for lam in (1e-2, 1e-3, 1e-4, 1e-6):
        dofs[lam] = [float(np.trace(np.linalg.solve(s + lam * np.trace(s) * np.eye(len(s)), s))) for s in covariances]
        assert value(f"dof_1e{round(math.log10(lam))}", net) == pytest.approx(
            math.sqrt(sum(dofs[lam]) / SAMPLES), rel=1e-5
        )
    for s in covariances:
        mu = np.sort(np.linalg.eigvalsh(s))[::-1]
        p = mu[mu > 0] / mu[mu > 0].sum()
        ranks += math.exp(-(p * np.log(p)).sum())
        tails += mu[5:].sum() / mu.sum()
    assert value("effective_rank", net) == pytest.approx(math.sqrt(ranks / SAMPLES), rel=1e-4)
    assert value("kolmogorov_tail", net) == pytest.approx(tails, rel=1e-4)
    assert value("dof_share", net) == pytest.approx(sum(dofs[1e-3]) / 15, rel=1e-5)
    a, b = dofs[1e-3]
    assert value("spectral_params", net) == pytest.approx(math.sqrt((6 * a + a * b + 3 * b) / SAMPLES), rel=1e-5)


def test_compression_measures_are_terms_of_one_bound() -> None:
    net = case(mlp(6, 16, 3), (6,))
    bias, variance = value("compression_bias", net), value("compression_variance", net)
    nats = 2 * SAMPLES * variance**2 - math.log(20)
    assert value("compression_bound", net) == pytest.approx(occam_bound(bias, SAMPLES, nats, 0.05).value, rel=1e-9)
    own = value("certificate_bits", net) ** 2 * SAMPLES
    assert own == pytest.approx(net.code.bits)
    assert value("compression_bound", net) <= net.code.bound
    assert net.pruned_code.bits < net.code.bits


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_order_of_nodes_and_samples_does_not_matter(seed: int) -> None:
    net = case(mlp(5, 6, 4, 3), (5,), start=mlp(5, 6, 4, 3, seed=3), seed=seed)
    rng = np.random.default_rng(seed)
    first, second = torch.from_numpy(rng.permutation(6)), torch.from_numpy(rng.permutation(4))

    def permuted(model: nn.Sequential) -> nn.Sequential:
        work = copy.deepcopy(model)
        with torch.no_grad():
            one, two, three = work[1], work[3], work[5]
            one.weight.copy_(one.weight[first])
            one.bias.copy_(one.bias[first])
            two.weight.copy_(two.weight[second][:, first])
            two.bias.copy_(two.bias[second])
            three.weight.copy_(three.weight[:, second])
        return work

    order = torch.from_numpy(rng.permutation(SAMPLES))
    other = MeasuredNetwork(permuted(net.model), net.inputs[order], net.targets[order], start=permuted(net.start))
    for name in CHEAP:
        if MEASURES[name].needs != "population":
            assert value(name, other) == pytest.approx(value(name, net), rel=1e-4, abs=1e-7), name


@settings(max_examples=15, deadline=None)
@given(st.floats(0.05, 20))
def test_rescaling_between_layers(factor: float) -> None:
    net = case(mlp(5, 6, 3, bias=False), (5,))
    scaled = copy.deepcopy(net.model)
    with torch.no_grad():
        scaled[1].weight.mul_(factor)
        scaled[3].weight.div_(factor)
    other = MeasuredNetwork(scaled, net.inputs, net.targets)
    invariant = ("log_prod_of_spec", "log_prod_of_fro", "fro_over_spec", "log_path_norm", "inverse_margin", "dof_1e-3")
    for name in (*invariant, "effective_rank", "kolmogorov_tail", "log_spec_orig_main", "spectral_params"):
        assert value(name, other) == pytest.approx(value(name, net), rel=2e-4), name


def test_registry_says_what_each_measure_is() -> None:
    assert len(MEASURES) > 40
    for name, measure in MEASURES.items():
        assert name == measure.name
        assert measure.meaning
        assert measure.formula
        assert measure.source
        assert measure.cost in ("weights", "pass", "noise", "pruning")
        assert measure.needs in ("", "start", "population")
    with pytest.raises(ValueError, match=r"'nonsense'.*params"):
        find_measures(["params", "nonsense"])


def test_what_is_not_defined_is_refused_with_its_reason() -> None:
    model = mlp(5, 6, 3)
    net = case(model, (5,))
    names = ["params", "fro_dist", "inverse_margin", "dof_1e-3"]
    found = network_measures(model, net.inputs, net.targets, names)
    assert list(found.values) == ["params", "inverse_margin", "dof_1e-3"]
    assert "start" in found.refused["fro_dist"]
    wrong = network_measures(model, net.inputs, (net.targets + 1) % 3, names)
    assert "90 %" in wrong.refused["inverse_margin"]
    assert [r["measure"] for r in json.loads(found.to_json())] == ["params", "inverse_margin", "dof_1e-3", "fro_dist"]
    linear = nn.Sequential(nn.Linear(5, 3))
    assert (
        "hidden" in network_measures(linear, net.inputs, linear(net.inputs).argmax(1), ["dof_1e-3"]).refused["dof_1e-3"]
    )
    still = network_measures(model, net.inputs, net.targets, ["log_bartlett", "l2_dist"], start=model)
    assert "where it started" in still.refused["log_bartlett"]
    assert still.values["l2_dist"] == 0


def test_bad_networks_and_data_are_errors() -> None:
    model = mlp(5, 6, 3)
    net = case(model, (5,))
    with pytest.raises(ValueError, match="int64"):
        network_measures(model, net.inputs, net.targets.float(), ["params"])
    dead = copy.deepcopy(model)
    with torch.no_grad():
        dead[3].weight.zero_()
    with pytest.raises(ValueError, match="'3' has only zero weights"):
        network_measures(dead, net.inputs, net.targets, ["params"])
    with pytest.raises(ValueError, match="shapes"):
        value("l2_dist", MeasuredNetwork(model, net.inputs, net.targets, start=mlp(5, 7, 3)))


def test_measuring_leaves_the_network_as_it_is() -> None:
    model = convnet().train()
    before = copy.deepcopy(model.state_dict())
    inputs = torch.rand(SAMPLES, 1, 6, 6)
    network_measures(model, inputs, torch.arange(SAMPLES) % 3, CHEAP)
    assert model.training
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_tables_have_the_sign_that_predicts_the_gap() -> None:
    lower = next(measure.name for measure in MEASURES.values() if not measure.higher_is_worse)
    rows = [{"params": 1.0, lower: 5.0}, {"params": 2.0, lower: 3.0}]
    table = measure_table([{"width": 8, "n": 100}, {"width": 16, "n": 100}], rows, [0.1, 0.2], n_test=100)
    assert table.column("params").tolist() == [1, 2]
    assert table.column(lower).tolist() == [-5, -3]
    assert list(table.hyperparameters) == ["width"]
    with pytest.raises(ValueError, match="network 1"):
        measure_table([{"width": 8}, {"width": 16}], [{"params": 1.0}, {"l2": 2.0}], [0.1, 0.2])


def trained(widths: tuple[int, ...] = (6, 24, 3), seed: int = 0) -> MeasuredNetwork:
    """A network trained on labels of a linear rule, so that it bears some noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(200, widths[0], generator=generator) - 0.5
    targets = (inputs @ torch.randn(widths[0], widths[-1], generator=generator)).argmax(1)
    model = mlp(*widths, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return MeasuredNetwork(
        model, inputs, targets, start=mlp(*widths, seed=seed), population=(inputs[:50] + 0.01, targets[:50])
    )


def test_noise_measures_are_their_formulas_at_the_noise_found() -> None:
    net = trained()
    w = np.concatenate([p.detach().double().flatten().numpy() for p in net.model.parameters()])
    v = np.concatenate([p.detach().double().flatten().numpy() for p in net.start.parameters()])
    m, sigma, rel, eps = 200, net.sigma, net.relative_sigma, 1e-3
    assert 0 < sigma < 2
    assert 0 < rel < 2
    tail = 10 + math.log(m / sigma)
    assert value("pacbayes_init", net) == pytest.approx(math.sqrt(((w - v) @ (w - v) / (4 * sigma**2) + tail) / m))
    assert value("pacbayes_orig", net) == pytest.approx(math.sqrt((w @ w / (4 * sigma**2) + tail) / m))
    assert value("pacbayes_flatness", net) == pytest.approx(1 / sigma / math.sqrt(m))
    assert value("pacbayes_mag_flatness", net) == pytest.approx(1 / rel / math.sqrt(m))
    for name, length in (("pacbayes_mag_init", (w - v) @ (w - v)), ("pacbayes_mag_orig", w @ w)):
        total = 10 + math.log(m / rel)
        for own, start in zip(w, v, strict=True):
            top = eps**2 + (rel**2 + 1) * length / len(w)
            total += 0.25 * math.log(top / (eps**2 + rel**2 * (own - start) ** 2))
        wanted = total / m if name == "pacbayes_mag_orig" else math.sqrt(total / m)
        assert value(name, net) == pytest.approx(wanted, rel=1e-9)


def test_noise_found_costs_a_tenth_of_the_accuracy() -> None:
    net = trained()
    generator = torch.Generator().manual_seed(5)

    def drop(sigma: float, relative: bool) -> float:
        right = []
        for _ in range(200):
            work = copy.deepcopy(net.model)
            with torch.no_grad():
                for p in work.parameters():
                    std = (sigma**2 * p**2 + 1e-6).sqrt() if relative else torch.full_like(p, sigma)
                    p.add_(std * torch.randn(p.shape, generator=generator))
                right.append(float((work(net.inputs).argmax(1) == net.targets).double().mean()))
        return 1 - net.train_error - float(np.mean(right))

    assert drop(net.sigma, False) == pytest.approx(0.1, abs=0.06)
    assert drop(net.relative_sigma, True) == pytest.approx(0.1, abs=0.06)


def test_prunability_measures_hold_their_tolerance() -> None:
    net = trained()
    loss = nn.functional.cross_entropy(net.model(net.inputs), net.targets).item()
    names = ("prunability", "prunability_relative", "prunability_random", "prunability_random_relative")
    found = {name: value(name, net) for name in (*names, "spectral_prunability")}
    assert all(0 < share <= 1 for share in found.values())
    assert found["prunability"] < found["prunability_random"]
    assert found["prunability"] <= found["prunability_relative"]
    for rule, name in (("magnitude", "prunability"), ("random", "prunability_random")):
        curve = prunability(net.model, net.inputs, net.targets, rule)
        assert found[name] == curve.fraction("absolute")
        assert found[f"{name}_relative"] == curve.fraction("relative")
    weights = torch.cat([net.model[1].weight.flatten(), net.model[3].weight.flatten()]).detach()
    count = round(found["prunability"] * len(weights))
    threshold = weights.abs().sort(descending=True).values[count - 1]
    work = copy.deepcopy(net.model)
    with torch.no_grad():
        for layer in (work[1], work[3]):
            layer.weight.mul_(layer.weight.abs() >= threshold)
    assert nn.functional.cross_entropy(work(net.inputs), net.targets).item() <= loss + 0.1 + 1e-6
    assert value("prunability_weights", net) == pytest.approx(math.sqrt(found["prunability"] * len(weights) / 200))
    wanted = math.sqrt(found["spectral_prunability"] * (6 * 24 + 24 * 3) / 200)
    assert value("spectral_prunability_weights", net) == pytest.approx(wanted)


def test_measures_of_the_inputs() -> None:
    net = trained()
    moved = value("smoothness", net)
    probabilities = torch.softmax(net.model(net.inputs), 1).detach()
    nearest = min(
        float((net.inputs[i] - net.inputs[j]).norm())
        for i in range(200)
        for j in range(i)
        if float((probabilities[i] - probabilities[j]).abs().max()) >= 0.5
    )
    assert 0 < moved <= nearest
    assert value("cover_complexity", net) > 0
    alone = MeasuredNetwork(net.model, net.inputs, net.targets)
    with pytest.raises(ValueError, match="population"):
        value("cover_complexity", alone)


def test_bounds_behind_measures_are_the_package_s_own() -> None:
    net = trained((6, 24, 12, 3))
    table = bound_table(net.model, [(net.inputs, net.targets)])
    dudley = next(bound for label, bound in table.bounds if (label, bound.name) == ("original", "covering (Dudley)"))
    assert value("log_covering_bound", net) == pytest.approx(math.log(dudley.value), rel=1e-9)
    found = cushions(net.model, [net.inputs], seed=0)
    total = 0.0
    for layer in found.layers:
        inner = min([1 / math.sqrt(layer.outputs), *layer.interlayer_quantile.values()])
        total += layer.overlap / (layer.cushion_quantile * inner) ** 2
    wanted = found.contraction * 3 * found.output_norm * math.sqrt(total) / (net.margin * math.sqrt(200))
    assert value("log_noise_stability", net) == pytest.approx(math.log(wanted), rel=1e-6)
