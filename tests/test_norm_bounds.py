"""Norm bounds: homogeneous coordinates, every step of the proofs, Monte-Carlo suprema, coverage, SymPy, invariances."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import trapezoid
from scipy.special import gammaln
from scipy.stats import norm

from specprune.bounds.bound import ORIGINAL, PRUNED
from specprune.bounds.covering import ramp_loss
from specprune.bounds.norms import (
    InputNorms,
    dense_norms,
    entropy_rademacher,
    layer_norms,
    product_exponent,
    unit_product,
)
from specprune.bounds.norms_pac_bayes import FAILURE, margin_error, neyshabur_2018_bound, noise_ratio
from specprune.bounds.norms_rademacher import (
    bartlett_bound,
    golowich_bound,
    neyshabur_2015_bound,
    neyshabur_2019_bound,
)
from specprune.bounds.occam import integer_code_length
from specprune.bounds.statement import DERIVED
from specprune.bounds.symbolic_norms import bartlett, neyshabur_2018, statements


def weights(sizes, seed=0, scale=1.0):
    generator = np.random.default_rng(seed)
    return [scale * generator.standard_normal((b, a)) / math.sqrt(a) for a, b in itertools.pairwise(sizes)]


def network(matrices, **options):
    last = len(matrices) - 1
    return [dense_norms(matrix, last=k == last, **options) for k, matrix in enumerate(matrices)]


def units_of(matrices):
    return unit_product(np.linalg.norm(matrices[0], axis=1), np.linalg.norm(matrices[1], axis=0))


def run(matrices, x):
    for k, matrix in enumerate(matrices):
        x = x @ matrix.T
        x = np.maximum(x, 0) if k < len(matrices) - 1 else x
    return x


INPUTS = InputNorms(1000, 30.0, 1.5, 12.0)
BOUNDS = {
    "bartlett union": lambda layers, inputs, loss=0.1, **kw: bartlett_bound(layers, inputs, empirical_ramp=loss, **kw),
    "bartlett fixed": lambda layers, inputs, loss=0.1, **kw: bartlett_bound(
        layers, inputs, empirical_ramp=loss, version="fixed", **kw
    ),
    "golowich": lambda layers, inputs, loss=0.1, **kw: golowich_bound(layers, inputs, empirical_ramp=loss, **kw),
    "golowich l1": lambda layers, inputs, loss=0.1, **kw: golowich_bound(
        layers, inputs, empirical_ramp=loss, version="l1", **kw
    ),
    "neyshabur 2015": lambda layers, inputs, loss=0.1, **kw: neyshabur_2015_bound(
        layers, inputs, empirical_ramp=loss, **kw
    ),
    "neyshabur 2019": lambda layers, inputs, loss=0.1, **kw: neyshabur_2019_bound(
        layers, layers[0].frobenius * layers[1].frobenius, inputs, empirical_ramp=loss, **kw
    ),
    "neyshabur 2018": lambda layers, inputs, loss=0.1, radius=2.0, **kw: neyshabur_2018_bound(
        layers, inputs, empirical_margin_error=loss, input_radius=radius, **kw
    ),
    "neyshabur 2018 layers": lambda layers, inputs, loss=0.1, radius=2.0, **kw: neyshabur_2018_bound(
        layers, inputs, empirical_margin_error=loss, input_radius=radius, version="layers", **kw
    ),
}
SETTING = {"gamma": 1.0, "delta": 0.05}
TWO = network(weights((6, 5, 3)))
every_bound = pytest.mark.parametrize("name", BOUNDS)


# Homogeneous coordinates


@pytest.mark.parametrize("constant", [0.25, 1.0, 8.0])
def test_biases_in_homogeneous_coordinates(constant):
    generator = np.random.default_rng(3)
    matrices = weights((6, 5, 4, 3), seed=1)
    biases = [generator.standard_normal(len(matrix)) for matrix in matrices]
    references = [generator.standard_normal(matrix.shape) for matrix in matrices]
    starts = [generator.standard_normal(len(matrix)) for matrix in matrices]
    x = generator.standard_normal((7, 6))
    plain, wide = x, np.hstack([x, np.full((7, 1), constant)])
    for k, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        extended = np.hstack([matrix, bias[:, None] / constant])
        moved = extended - np.hstack([references[k], starts[k][:, None] / constant])
        if k < 2:
            extended = np.vstack([extended, [0.0] * matrix.shape[1] + [1.0]])
            moved = np.vstack([moved, np.zeros(matrix.shape[1] + 1)])
        found = dense_norms(
            matrix,
            bias,
            reference=references[k],
            reference_bias=starts[k],
            constant=constant,
            last=k == 2,
            lipschitz=0.5,
        )
        assert found.frobenius == pytest.approx(np.linalg.norm(extended))
        assert found.two_one == pytest.approx(np.linalg.norm(extended, axis=1).sum())
        assert found.one_inf == pytest.approx(np.abs(extended).sum(axis=1).max())
        assert found.frobenius_distance == pytest.approx(np.linalg.norm(moved))
        assert found.two_one_distance == pytest.approx(np.linalg.norm(moved, axis=1).sum())
        assert (found.rows, found.columns) == extended.shape
        exact = np.linalg.norm(extended, 2)
        crude = np.linalg.norm(matrix, 2) + np.linalg.norm(bias) / constant + (k < 2)
        assert exact <= found.operator_norm < crude
        assert found.lipschitz == (1.0 if k < 2 else 0.5)
        plain, wide = plain @ matrix.T + bias, wide @ extended.T
        if k < 2:
            plain, wide = np.maximum(plain, 0), np.maximum(wide, 0)
    assert wide == pytest.approx(plain)
    norms = InputNorms.of(x, int(math.log2(constant)))
    ones = np.hstack([x, np.full((7, 1), constant)])
    assert norms.extended_frobenius == pytest.approx(np.linalg.norm(ones))
    assert norms.extended_coordinate == pytest.approx(np.linalg.norm(ones, axis=0).max())
    assert norms.largest == pytest.approx(np.linalg.norm(x, axis=1).max())


def test_without_biases_there_is_no_constant_coordinate():
    (matrix,) = weights((6, 4))
    found = dense_norms(matrix, last=True)
    assert found.frobenius == found.frobenius_distance == pytest.approx(np.linalg.norm(matrix))
    assert found.two_one == found.two_one_distance
    assert (found.rows, found.columns) == (4, 6)
    with pytest.raises(ValueError, match="constant coordinate"):
        dense_norms(matrix, np.ones(4))
    assert dense_norms(matrix, np.zeros(4), last=True) == found


def test_small_layers_still_carry_the_constant_on():
    found = dense_norms(np.full((2, 3), 1e-3), np.full(2, 1e-3), constant=1.0)
    assert found.one_inf == 1.0
    assert found.operator_norm >= 1.0
    assert found.two_one > 1.0
    assert found.two_one_distance < 0.01


def test_the_constant_lengthens_every_input():
    """The radius of the extended inputs is sqrt(3^2 + 4^2) = 5; nothing else but the price of c changes."""
    extended = neyshabur_2018_bound(
        TWO, replace(INPUTS, constant_exponent=2), empirical_margin_error=0.1, input_radius=3.0, **SETTING
    )
    plain = neyshabur_2018_bound(TWO, INPUTS, empirical_margin_error=0.1, input_radius=5.0, **SETTING)
    assert extended.terms["variance"] == pytest.approx(plain.terms["variance"])
    assert extended.terms["confidence"] > plain.terms["confidence"]


def test_the_choice_of_the_constant_is_paid():
    lengths = [InputNorms(10, 1.0, 1.0, 1.0, k).price for k in range(-200, 201)]
    assert sum(math.exp(-length) for length in [*lengths, INPUTS.price]) <= 1
    bound = golowich_bound(TWO, INPUTS, empirical_ramp=0.0, **SETTING)
    other = golowich_bound(TWO, replace(INPUTS, constant_exponent=-9), empirical_ramp=0.0, **SETTING)
    squares = [2 * 1000 * (item.terms["confidence"] / 3) ** 2 for item in (bound, other)]
    assert squares[1] - squares[0] == pytest.approx(integer_code_length(9) - math.log(4))


# Steps of the proofs


def test_better_of_zero_and_the_average():
    """Step 1 of Bartlett: zero or the best average of k is within 1/(k+1) in square, and there are at most N^k."""
    for k in range(1, 8):
        squares = np.linspace(0, 1, 1001)
        assert np.all(np.minimum(squares, (1 - squares) / k) <= 1 / (k + 1) + 1e-15)
    for points in (2, 3, 10, 100):
        for k in range(1, 6):
            assert math.comb(points + k - 1, k) + 1 <= (points + 1) ** k
    # By exhaustion: the plane's cross-polytope, k = 1, 2, 3 draws from +-e_1, +-e_2.
    corners = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=float)
    generator = np.random.default_rng(0)
    inside = generator.dirichlet(np.ones(4), 400) @ corners
    for k in (1, 2, 3):
        picks = np.array(list(itertools.combinations_with_replacement(range(4), k)))
        centres = np.vstack([corners[picks].mean(axis=1), np.zeros((1, 2))])
        nearest = np.square(inside[:, None] - centres).sum(axis=2).min(axis=1)
        assert nearest.max() <= 1 / (k + 1)


def test_entropy_rademacher_against_a_ball():
    """A Euclidean ball of radius r around (1/2, ..., 1/2): complexity r/sqrt(n), ln N <= n ln(1 + 2r/e) below r."""
    for n, r in ((100, 0.5), (10**6, 0.1), (10**4, 0.01)):
        e = r * np.linspace(1e-6, 1, 10**5)
        radius = math.sqrt(float(np.max(e**2 * n * np.log1p(2 * r / e))))
        bound = entropy_rademacher(math.log(radius), n)
        truth = r / math.sqrt(n)
        assert truth <= bound <= 60 * truth
    # A ball that fills the scales evenly: axis t^-1/2 at place t.  Its complexity has the logarithm too.
    n = 4096
    axes = 0.5 / np.sqrt(np.arange(1, n + 1))
    signs = np.linalg.norm(axes) / n  # exact supremum over the ellipsoid, the same for all signs
    e = np.geomspace(0.02, 0.5, 400)
    # Volume of the ellipsoid's long axes: ln N(e) <= sum over axes above e/2 of ln(6 axis / e).
    entropy = [np.log(6 * axes[axes > s / 2] / s).sum() for s in e]
    radius = math.sqrt(float(np.max(e**2 * entropy)))
    assert signs <= entropy_rademacher(math.log(radius), n)


@given(st.floats(-12, 25), st.integers(2, 10**9))
def test_entropy_rademacher_is_the_best_number_of_levels(log_radius, n):
    value = entropy_rademacher(log_radius, n)
    step = math.sqrt(2) * math.e * math.exp(log_radius) / n
    assert value == pytest.approx(min(math.exp(-m) / 2 + step * m for m in range(1, 41)))
    dudley = 12 * math.exp(log_radius) / n
    if 0.1 > 3 * math.exp(log_radius) / n > 1e-15:
        assert value <= dudley * (1 + math.log(n / 3 / math.exp(log_radius)))  # 4a/sqrt(n) + 12/n int_a sqrt(ln N)
    assert entropy_rademacher(log_radius + 0.1, n) >= value


def test_linear_classes_by_monte_carlo():
    """One layer: the supremum of the contracted sum is ||sum_i e_ik x_i||_F, which sqrt(K) ||X|| barely exceeds."""
    generator = np.random.default_rng(5)
    n, classes = 50, 6
    x = generator.standard_normal((n, 20))
    signs = generator.choice([-1.0, 1.0], (2000, classes, n))
    supremum = np.linalg.norm(signs @ x, axis=(1, 2)).mean()
    row = np.abs(signs @ x).max(axis=2).sum(axis=1).mean()  # rows with l1 norm 1
    layer = [dense_norms(np.ones((classes, 20)) / math.sqrt(20 * classes), last=True)]
    layer = [replace(layer[0], frobenius=1.0, one_inf=1.0)]
    inputs = InputNorms.of(x)
    for bound, factor, truth, low in (
        (neyshabur_2015_bound(layer, inputs, empirical_ramp=0.0, **SETTING), 1.0, supremum, 0.98),
        (golowich_bound(layer, inputs, empirical_ramp=0.0, **SETTING), math.sqrt(2), supremum, 0.98),
        (golowich_bound(layer, inputs, empirical_ramp=0.0, version="l1", **SETTING), 1.0, row, 0.6),
    ):
        value = bound.terms["variance"] * n / 4 / factor
        assert low * value <= truth <= value


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_peeled_classes_by_monte_carlo(depth):
    """Deep classes, one unit a layer and class: suprema over signs of weights and directions, on a grid in the plane.

    With unit Frobenius norms, width 1 behind the first layer gives sup_u sup_a ||(sum_i e_ik relu(u x_i))_k||, which
    every depth attains.
    """
    generator = np.random.default_rng(depth)
    n, classes = 40, 3
    x = generator.standard_normal((n, 2))
    angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    units = np.maximum(x @ np.stack([np.cos(angles), np.sin(angles)]), 0)
    signs = generator.choice([-1.0, 1.0], (2000, classes, n))
    supremum = np.linalg.norm(signs @ units, axis=1).max(axis=1).mean()
    layers = [replace(layer, frobenius=1.0) for layer in network(weights((2, *[4] * (depth - 1), classes)))]
    inputs = InputNorms.of(x)
    found = {
        "2015": neyshabur_2015_bound(layers, inputs, empirical_ramp=0.0, **SETTING),
        "golowich": golowich_bound(layers, inputs, empirical_ramp=0.0, **SETTING),
    }
    if depth == 2:
        found["2019"] = neyshabur_2019_bound(layers, 1.0, inputs, empirical_ramp=0.0, **SETTING)
    for bound in found.values():
        value = bound.terms["variance"] * n / 4
        assert supremum <= value
        assert supremum >= value / 5
    if depth == 2:
        assert found["2019"].value == pytest.approx(found["2015"].value)


def test_noise_moves_the_network_by_at_most_the_margin():
    """Step 1 of Neyshabur 2018, with worst-case noise (along the top singular vectors) and with random noise."""
    generator = np.random.default_rng(2)
    gamma = 0.7
    for depth in (1, 2, 4):
        matrices = weights((5, *[6] * (depth - 1), 3), seed=depth)
        sizes = [np.linalg.norm(matrix, 2) for matrix in matrices]
        x = generator.standard_normal((200, 5))
        radius = np.linalg.norm(x, axis=1).max()
        sensitivity = math.log(2 * math.sqrt(2) * radius * math.prod(sizes) / gamma)
        eta = math.exp(noise_ratio(sensitivity, depth))
        assert (1 + eta) ** depth - 1 == pytest.approx(math.exp(-sensitivity))
        for _ in range(20):
            noise = [generator.standard_normal(matrix.shape) for matrix in matrices]
            noise = [eta * s * u / np.linalg.norm(u, 2) for u, s in zip(noise, sizes, strict=True)]
            noisy = [a + u for a, u in zip(matrices, noise, strict=True)]
            logits, moved = run(matrices, x), run(noisy, x)
            assert np.linalg.norm(moved - logits, axis=1).max() <= gamma / (2 * math.sqrt(2))
            for k in range(3):
                other = [c for c in range(3) if c != k]
                margins = [z[:, k] - z[:, other].max(axis=1) for z in (logits, moved)]
                assert np.abs(margins[0] - margins[1]).max() <= gamma / 2
        # A line of positive numbers attains the limit.
        line = [np.array([[s]]) for s in sizes]
        top = run([a * (1 + eta) for a in line], np.array([[radius]])) - run(line, np.array([[radius]]))
        assert top.item() == pytest.approx(gamma / (2 * math.sqrt(2)))
    assert noise_ratio(1000.0, 3) == pytest.approx(-1000 - math.log(3))
    assert noise_ratio(-3000.0, 3) == pytest.approx(1000.0)
    for border in (30.0, -700.0):
        assert noise_ratio(border - 1e-9, 3) == pytest.approx(noise_ratio(border + 1e-9, 3), abs=1e-8)


def test_norms_of_gaussian_matrices():
    """Step 2 of Neyshabur 2018: P(||G|| > sqrt(rows) + sqrt(columns) + t) <= exp(-t^2/2)."""
    generator = np.random.default_rng(4)
    for rows, columns in ((1, 1), (3, 2), (20, 30)):
        norms = np.linalg.norm(generator.standard_normal((2000, rows, columns)), 2, axis=(1, 2))
        for t in (0.0, 0.5, 1.0):
            assert np.mean(norms > math.sqrt(rows) + math.sqrt(columns) + t) <= math.exp(-(t**2) / 2)
        assert norms.max() > 0.7 * (math.sqrt(rows) + math.sqrt(columns))


@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0])
def test_divergence_after_conditioning(shift):
    """Step 3: a Gaussian around `shift` cut at a quantile, against the prior N(0, 1), by quadrature."""
    for z in (1 - FAILURE, 0.97, 0.999):
        cut = norm.ppf((1 + z) / 2)
        grid = np.linspace(shift - cut, shift + cut, 200001)
        density = norm.pdf(grid - shift) / z
        divergence = trapezoid(density * (np.log(density) - norm.logpdf(grid)), grid)
        entropy = -FAILURE * math.log(FAILURE) - (1 - FAILURE) * math.log(1 - FAILURE)
        assert divergence <= (shift**2 / 2 + entropy) / (1 - FAILURE)


def test_maurer_constant():
    """Step 4: sum_k C(n, k) (k/n)^k (1 - k/n)^(n - k) <= 2 sqrt(n) for every n >= 1."""
    for n in [*range(1, 60), 1000, 60000]:
        k = np.arange(n + 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.nan_to_num(k * np.log(k / n)) + np.nan_to_num((n - k) * np.log1p(-k / n))
        total = np.exp(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1) + terms).sum()
        assert total <= 2 * math.sqrt(n) * (1 + 1e-9)


# Coverage


ATOMS = 48


def circle():
    """Return points on the unit circle, and probabilities of (point, label): a half plane with 15% wrong labels."""
    angles = 2 * np.pi * (np.arange(ATOMS) + 0.5) / ATOMS
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    right = (points[:, 0] > 0).astype(int)
    table = np.full((ATOMS, 2), 0.15)
    table[np.arange(ATOMS), right] = 0.85
    return points, table / ATOMS


def candidates(depth):
    """Return networks of one size and one set of norms, so that one complexity holds for all of them."""
    if depth == 1:
        angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
        return [[0.6 * np.array([[-math.cos(a), -math.sin(a)], [math.cos(a), math.sin(a)]])] for a in angles]
    # Two units along +-u, read with opposite signs: the ReLU network computes u x.
    return [
        [0.8 * np.array([[-m[0][1, 0], -m[0][1, 1]], [m[0][1, 0], m[0][1, 1]]]) / 0.6, np.eye(2)] for m in candidates(1)
    ]


@pytest.mark.parametrize(
    ("name", "depth", "n"),
    [
        ("bartlett union", 1, 10**6),
        ("bartlett union", 2, 10**7),
        ("golowich", 1, 10**4),
        ("golowich", 2, 10**5),
        ("golowich l1", 2, 10**5),
        ("neyshabur 2015", 1, 10**4),
        ("neyshabur 2015", 2, 10**5),
        ("neyshabur 2019", 2, 10**5),
        ("neyshabur 2018", 1, 2000),
        ("neyshabur 2018", 2, 10**5),
        ("neyshabur 2018 layers", 2, 10**5),
    ],
)
def test_coverage(name, depth, n):
    """1500 training sets, the network chosen for the largest gap each time: the bound may fail for 5% of them."""
    gamma, sets = 0.5, 1500
    points, table = circle()
    nets = candidates(depth)
    errors, losses = [], []
    for net in nets:
        logits = run(net, points)
        margins = np.stack([logits[:, 0] - logits[:, 1], logits[:, 1] - logits[:, 0]], axis=1)
        errors.append(float((table * (margins <= 0)).sum()))
        losses.append(margins <= gamma if "2018" in name else np.clip(1 - margins / gamma, 0, 1))
    losses, errors = np.array(losses, dtype=float), np.array(errors)
    generator = np.random.default_rng(n + depth)
    counts = generator.multinomial(n, table.ravel(), size=sets)
    empirical = counts @ losses.reshape(len(nets), -1).T / n
    # Every point has norm 1; the best column is at most sqrt(n) long.
    inputs = InputNorms(n, math.sqrt(n), 1.0, math.sqrt(n))
    complexity = {
        BOUNDS[name](network(net), inputs, gamma=gamma, delta=0.05, loss=0.0, **radius(name)).value for net in nets
    }
    limit = empirical + max(complexity)
    failures = np.mean(np.any(errors > limit, axis=1))
    assert failures <= 0.05
    assert np.median(limit.min(axis=1)) < 0.95  # not vacuous
    # On the sample's own loss, whose mean is known, the gap is what the theorem bounds.
    risk = (losses * table).sum(axis=(1, 2))
    gap = (risk - empirical).max(axis=1)
    assert np.mean(gap > max(complexity)) <= 0.05
    assert np.mean(gap > 0) > 0.5  # the selection overfits indeed


def radius(name):
    return {"radius": 1.0} if "2018" in name else {}


@pytest.mark.parametrize("name", ["bartlett union", "golowich", "neyshabur 2015"])
@pytest.mark.parametrize("depth", [1, 2])
def test_ramp_losses_against_random_signs(name, depth):
    """The complexity of the ramp losses themselves, signs summed over the examples that share a point and a label."""
    n, gamma = 48 * 2 * 100, 0.5
    points, _ = circle()
    losses = []
    for net in candidates(depth):
        logits = run(net, points)
        margin = logits[:, 0] - logits[:, 1]
        losses.append(np.clip(1 - np.stack([margin, -margin], axis=1) / gamma, 0, 1).ravel())
    signs = 2 * np.random.default_rng(8).binomial(100, 0.5, (2000, 2 * ATOMS)) - 100
    supremum = (signs @ np.array(losses).T).max(axis=1).mean() / n
    inputs = InputNorms(n, math.sqrt(n), 1.0, math.sqrt(n))
    bound = BOUNDS[name](network(candidates(depth)[0]), inputs, gamma=gamma, delta=0.05)
    assert 0 < supremum <= bound.terms["variance"] / 2


# Form of the values


@every_bound
def test_parts_and_labels(name):
    bound = BOUNDS[name](TWO, INPUTS, gamma=0.7, delta=0.05)
    assert set(bound.terms) == {"empirical", "variance", "confidence"}
    assert bound.value == pytest.approx(sum(bound.terms.values()))
    assert bound.covers == ORIGINAL
    assert bound.trivial == 1.0
    assert bound.confidence == 0.95
    assert bound.loss == ("margin(0.5)" if "2018" in name else "ramp(0.5)")
    assert BOUNDS[name](TWO, INPUTS, covers=PRUNED, **SETTING).covers == PRUNED
    assert bound.valid is (name != "bartlett fixed")


@every_bound
@settings(max_examples=30)
@given(st.floats(1.0, 50.0), st.integers(0, 2**32))
def test_monotone(name, factor, seed):
    layers = network(weights((6, 5, 3), seed=seed))
    bound = BOUNDS[name]
    base = bound(layers, INPUTS, **SETTING)
    assert bound(layers, INPUTS, gamma=1.0, delta=0.05 / factor).value >= base.value
    assert bound(layers, INPUTS, gamma=factor, delta=0.05).terms["variance"] <= base.terms["variance"] * (1 + 1e-12)
    more = InputNorms(round(1000 * factor), 30.0 * math.sqrt(factor), 1.5, 12.0 * math.sqrt(factor))
    assert bound(layers, more, **SETTING).value <= base.value + 1e-4
    longer = replace(INPUTS, frobenius=30.0 * factor, coordinate=12.0 * factor)
    assert bound(layers, longer, **SETTING).value >= base.value - 1e-12
    if "2018" in name:
        assert bound(layers, INPUTS, radius=2 * factor, **SETTING).value >= base.value
    for index in (0, 1):
        for norms in (("frobenius",), ("one_inf",), ("frobenius_distance",), ("two_one_distance",)):
            larger = list(layers)
            larger[index] = replace(layers[index], **{key: factor * getattr(layers[index], key) for key in norms})
            assert bound(larger, INPUTS, **SETTING).value >= base.value - 1e-12
    if name.startswith("bartlett"):
        larger = [replace(layer, operator_norm=factor * layer.operator_norm) for layer in layers]
        assert bound(larger, INPUTS, **SETTING).value >= base.value - 1e-12


@pytest.mark.parametrize("name", [name for name in BOUNDS if name not in ("bartlett union", "neyshabur 2018 layers")])
@settings(max_examples=20)
@given(st.floats(0.01, 100.0), st.integers(0, 1000))
def test_rescaling_between_layers_and_permuting_nodes_change_nothing(name, t, seed):
    matrices = weights((6, 5, 3), seed=seed)
    order = np.random.default_rng(seed).permutation(5)
    permuted = [matrices[0][order], matrices[1][:, order]]
    scaled = [t * permuted[0], permuted[1] / t]

    def bound(matrices):
        return BOUNDS[name](network(matrices), INPUTS, **SETTING).value

    assert bound(permuted) == pytest.approx(bound(matrices), rel=1e-9)
    assert bound(scaled) == pytest.approx(bound(matrices), rel=1e-9)
    assert units_of(scaled) == pytest.approx(units_of(matrices))
    assert units_of(matrices) <= np.linalg.norm(matrices[0]) * np.linalg.norm(matrices[1])


@every_bound
def test_permuting_nodes_changes_nothing(name):
    matrices = weights((6, 5, 3), seed=9)
    order = np.random.default_rng(0).permutation(5)
    permuted = [matrices[0][order], matrices[1][:, order]]
    first, second = (BOUNDS[name](network(m), INPUTS, **SETTING).value for m in (matrices, permuted))
    assert first == pytest.approx(second, rel=1e-9)


@every_bound
def test_margins_are_rounded_down(name):
    bound = BOUNDS[name]
    assert bound(TWO, INPUTS, gamma=1.99, delta=0.05).value == bound(TWO, INPUTS, **SETTING).value
    assert bound(TWO, INPUTS, gamma=0.99, delta=0.05).value > bound(TWO, INPUTS, **SETTING).value


def test_norms_are_rounded_up_and_paid():
    low = [replace(layer, operator_norm=1.01, two_one_distance=2.01) for layer in TWO]
    high = [replace(layer, operator_norm=2.0, two_one_distance=4.0) for layer in TWO]
    one, other = (bartlett_bound(layers, INPUTS, empirical_ramp=0.1, **SETTING) for layers in (low, high))
    assert one.value == other.value
    price = 2 * math.log(12) + 2 * math.log(24) + math.log(4) + math.log(4)  # s = 2^1, a = 2^2, gamma = 2^0, no c
    assert one.terms["confidence"] == pytest.approx(3 * math.sqrt((math.log(40) + price) / 2000))
    fixed = bartlett_bound(low, INPUTS, version="fixed", limits=[(2.0, 4.0)] * 2, empirical_ramp=0.1, **SETTING)
    assert fixed.terms["variance"] == pytest.approx(one.terms["variance"])
    assert fixed.terms["confidence"] == pytest.approx(3 * math.sqrt((math.log(40) + 2 * math.log(4)) / 2000))
    layers = [replace(layer, frobenius=3.0) for layer in TWO]  # product 9, rounded to 2^4
    bound = golowich_bound(layers, INPUTS, empirical_ramp=0.1, **SETTING)
    assert (
        bound.value
        == golowich_bound([replace(layer, frobenius=4.0) for layer in TWO], INPUTS, empirical_ramp=0.1, **SETTING).value
    )
    price = math.log(60) + 2 * math.log(4)
    assert bound.terms["confidence"] == pytest.approx(3 * math.sqrt((math.log(40) + price) / 2000))


@given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=8))
def test_exponents_of_products(values):
    found = product_exponent(values)
    exact = math.fsum(math.log2(value) for value in values)
    assert exact - 1e-9 <= found <= exact + 1 + 1e-9


def test_exponents_of_exact_products():
    assert product_exponent([8.0, 0.25, 1.0]) == 1
    assert product_exponent([1e300] * 4) == math.ceil(4 * math.log2(1e300))
    assert product_exponent([3.0, 0.0, 1e300]) == -20
    with pytest.raises(ValueError, match="factor"):
        product_exponent([1.0, -1.0])


def test_a_reference_shortens_distances():
    matrices = weights((6, 5, 3))
    near = [dense_norms(m, reference=m + 1e-3, last=k == 1) for k, m in enumerate(matrices)]
    for name in ("bartlett union", "neyshabur 2018 layers"):
        far, close = BOUNDS[name](TWO, INPUTS, **SETTING), BOUNDS[name](near, INPUTS, **SETTING)
        assert close.terms["variance"] < 0.1 * far.terms["variance"]
    for name in ("golowich", "neyshabur 2018"):
        assert BOUNDS[name](near, INPUTS, **SETTING).value == BOUNDS[name](TWO, INPUTS, **SETTING).value


@every_bound
def test_huge_and_vanishing_norms(name):
    huge = [
        replace(layer, **dict.fromkeys(("operator_norm", "frobenius", "one_inf", "two_one_distance"), 1e150))
        for layer in TWO
    ]
    found = BOUNDS[name](huge, INPUTS, **SETTING)
    assert found.vacuous
    assert not math.isnan(found.value)
    zero = network([np.zeros((5, 6)), np.zeros((3, 5))])
    small = BOUNDS[name](zero, replace(INPUTS, samples=10**6), **SETTING)
    assert not small.vacuous
    assert small.value >= 0.1
    half = network([np.zeros((5, 6)), np.ones((3, 5))])
    assert math.isfinite(BOUNDS[name](half, INPUTS, **SETTING).value)


def test_deep_products_do_not_overflow():
    layers = [replace(TWO[0], operator_norm=1e200, frobenius=1e200)] * 30
    assert golowich_bound(layers, INPUTS, empirical_ramp=0.1, **SETTING).value == math.inf
    tiny = [replace(TWO[0], operator_norm=1e-200, frobenius=1e-200)] * 30
    found = neyshabur_2018_bound(tiny, INPUTS, empirical_margin_error=0.1, input_radius=2.0, **SETTING)
    assert found.value < math.inf


# Hypotheses


def broken(bound):
    return [item.statement for item in bound.hypotheses if not item.holds]


def test_maps_that_a_theorem_excludes():
    pooled = [replace(TWO[0], elementwise=False), TWO[1]]
    curved = [replace(TWO[0], homogeneous=False), TWO[1]]
    for name in ("golowich", "golowich l1", "neyshabur 2015", "neyshabur 2019"):
        assert not BOUNDS[name](pooled, INPUTS, **SETTING).valid
        assert not BOUNDS[name](curved, INPUTS, **SETTING).valid
    for name in ("bartlett union", "neyshabur 2018 layers"):
        assert BOUNDS[name](pooled, INPUTS, **SETTING).valid
        assert BOUNDS[name](curved, INPUTS, **SETTING).valid
    assert BOUNDS["neyshabur 2018"](pooled, INPUTS, **SETTING).valid
    assert not BOUNDS["neyshabur 2018"](curved, INPUTS, **SETTING).valid


def test_limits_and_radius_are_checked():
    fixed = bartlett_bound(TWO, INPUTS, version="fixed", empirical_ramp=0.1, **SETTING)
    assert broken(fixed) == ["norm limits were fixed before the data"]
    wide = bartlett_bound(TWO, INPUTS, version="fixed", limits=[(9, 9)] * 2, empirical_ramp=0.1, **SETTING)
    assert wide.valid
    narrow = bartlett_bound(TWO, INPUTS, version="fixed", limits=[(9, 9), (9, 0.1)], empirical_ramp=0.1, **SETTING)
    assert broken(narrow) == ["every layer keeps its norm limits (layers that do not)"]
    for given_radius, sound in ((2.0, True), (1.4, False), (None, False)):
        bound = neyshabur_2018_bound(TWO, INPUTS, empirical_margin_error=0.1, input_radius=given_radius, **SETTING)
        assert bound.valid is sound


def test_margin_error_by_hand_and_order():
    logits = np.array([[2.0, 0.0, 1.5], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert margin_error(logits, [0, 1, 0], 0.5) == pytest.approx(2 / 3)
    assert margin_error(logits, [0, 1, 0], 0.4) == pytest.approx(1 / 3)
    generator = np.random.default_rng(3)
    scores, labels = generator.standard_normal((500, 4)), generator.integers(0, 4, 500)
    for gamma in (0.1, 1.0, 3.0):
        assert margin_error(scores, labels, gamma) >= ramp_loss(scores, labels, gamma)
    with pytest.raises(ValueError, match="labels"):
        margin_error(logits, [0, 1], 1.0)


# SymPy


def compare(bound, statement, inputs):
    assert statement.provenance == DERIVED
    assert float(statement.lambdify()(*inputs)) == pytest.approx(bound.value, rel=1e-12)
    assert statement.latex()


def test_sympy_statements_equal_the_code():
    formulas = {item.name: item for item in statements()}
    layers = [
        replace(TWO[0], operator_norm=2.0, frobenius=4.0, one_inf=8.0, two_one_distance=4.0),
        replace(TWO[1], operator_norm=0.5, frobenius=2.0, one_inf=0.25, two_one_distance=1.0),
    ]
    n, x, column = 1000, 30.0, 12.0
    code = integer_code_length
    free = 2 * math.log(4)  # gamma = 2^0 and no constant
    for samples in (n, 10**9):
        inputs = replace(INPUTS, samples=samples)
        price = free + code(1) + code(2) + code(-1) + code(0)
        values = (0.1, samples, 0.05, price, 1.0, x, 2.0, 4.0, 2 * 5 * 6 + 1, 0.5, 1.0, 2 * 3 * 5 + 1)
        compare(BOUNDS["bartlett union"](layers, inputs, **SETTING), formulas["bartlett_2017"], values)
    common = (0.1, n, 0.05)
    half = {"gamma": 0.5, "delta": 0.05}
    price = math.log(4) + code(-1) + code(3)
    compare(BOUNDS["golowich"](layers, INPUTS, **half), formulas["golowich_2018"], (*common, price, 0.5, 8.0, 3, 2, x))
    compare(
        BOUNDS["neyshabur 2015"](layers, INPUTS, **half),
        formulas["neyshabur_2015"],
        (*common, price, 0.5, 8.0, 3, 2.0, x),
    )
    compare(
        BOUNDS["neyshabur 2019"](layers, INPUTS, **half), formulas["neyshabur_2019"], (*common, price, 0.5, 8.0, 3, x)
    )
    price = math.log(4) + code(-1) + code(1)
    compare(
        BOUNDS["golowich l1"](layers, INPUTS, **half),
        formulas["golowich_2018_l1"],
        (*common, price, 0.5, 2.0, 3, 2, column, 6),
    )
    price = free + code(0)
    heights = [math.sqrt(5) + math.sqrt(6), math.sqrt(3) + math.sqrt(5)]
    values = (*common, price, 1.0, 2.0, 1.0, heights[0], 4.0 / 2, heights[1], 2 / 0.5)
    compare(BOUNDS["neyshabur 2018"](layers, INPUTS, **SETTING), formulas["neyshabur_2018"], values)
    price = free + code(1) + code(-1)
    first, second = layers[0].frobenius_distance / 2, layers[1].frobenius_distance / 0.5
    values = (*common, price, 1.0, 2.0, 1.0, heights[0], first, heights[1], second)
    compare(BOUNDS["neyshabur 2018 layers"](layers, INPUTS, **SETTING), formulas["neyshabur_2018"], values)


def test_sympy_statements_of_other_depths():
    layers = network(weights((6, 5, 4, 3)))
    layers = [replace(layer, operator_norm=2.0, two_one_distance=4.0, frobenius=3.0) for layer in layers]
    price = 2 * math.log(4) + 3 * (integer_code_length(1) + integer_code_length(2))
    sizes = [2 * layer.rows * layer.columns + 1 for layer in layers]
    values = [value for size in sizes for value in (2.0, 4.0, size)]
    compare(
        BOUNDS["bartlett union"](layers, INPUTS, **SETTING), bartlett(3), (0.1, 1000, 0.05, price, 1.0, 30.0, *values)
    )
    price = 2 * math.log(4) + integer_code_length(3)
    values = [v for layer in layers for v in (math.sqrt(layer.rows) + math.sqrt(layer.columns), 1.5)]
    compare(
        BOUNDS["neyshabur 2018"](layers, INPUTS, **SETTING),
        neyshabur_2018(3),
        (0.1, 1000, 0.05, price, 1.0, 2.0, 8.0, *values),
    )
    with pytest.raises(ValueError, match="depth"):
        bartlett(0)
    with pytest.raises(ValueError, match="depth"):
        neyshabur_2018(0)


# Refusals


@every_bound
def test_refusals(name):
    bound = BOUNDS[name]
    for change in ({"gamma": 0.0}, {"delta": 1.0}, {"delta": 0.0}, {"loss": 1.5}):
        with pytest.raises(ValueError):
            bound(TWO, INPUTS, **{**SETTING, **change})
    if name != "neyshabur 2019":
        with pytest.raises(ValueError, match="at least one"):
            bound([], INPUTS, **SETTING)


def test_more_refusals():
    with pytest.raises(ValueError, match="two layers"):
        neyshabur_2019_bound(TWO[:1], 1.0, INPUTS, empirical_ramp=0.1, **SETTING)
    for function, loss in ((golowich_bound, "empirical_ramp"), (bartlett_bound, "empirical_ramp")):
        with pytest.raises(ValueError, match="version"):
            function(TWO, INPUTS, version="other", **{loss: 0.1}, **SETTING)
    with pytest.raises(ValueError, match="version"):
        neyshabur_2018_bound(TWO, INPUTS, version="x", empirical_margin_error=0.1, input_radius=2.0, **SETTING)
    with pytest.raises(ValueError, match="belong to"):
        bartlett_bound(TWO, INPUTS, limits=[(1, 1)] * 2, empirical_ramp=0.1, **SETTING)
    with pytest.raises(ValueError, match="1 entries for 2 layers"):
        bartlett_bound(TWO, INPUTS, version="fixed", limits=[(1, 1)], empirical_ramp=0.1, **SETTING)
    with pytest.raises(ValueError, match="frobenius"):
        replace(TWO[0], frobenius=math.nan)
    with pytest.raises(ValueError, match="constant_exponent"):
        replace(INPUTS, constant_exponent=2000)
    with pytest.raises(ValueError, match="inputs"):
        InputNorms.of(np.zeros(3))
    with pytest.raises(ValueError, match="reference has shape"):
        dense_norms(np.ones((2, 3)), reference=np.ones((3, 2)))
    with pytest.raises(ValueError, match="weight"):
        dense_norms(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="one entry for each row"):
        layer_norms(1.0, [1.0, 1.0], [1.0], 3)
    with pytest.raises(ValueError, match="units"):
        unit_product([1.0], [1.0, 2.0])
