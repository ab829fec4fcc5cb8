import math

import numpy as np
import pytest

from specprune.bounds.nodes import Feasibility, feasibility, reconstruction_matrix, weighted_nodes
from specprune.bounds.recurrent import recurrent_a_priori, recurrent_certificate
from specprune.bounds.spectral import PrunedLayer, prune_dense_layer
from specprune.bounds.symbolic import STATEMENTS

SAMPLES, STEPS, WIDTH, INPUTS, OUTPUTS = 40, 12, 16, 3, 4


def run(inputs, weight, into, bias, activation):
    state, states = np.zeros((len(inputs), len(weight))), []
    for step in range(inputs.shape[1]):
        state = activation(state @ weight.T + inputs[:, step] @ into.T + bias)
        states.append(state)
    return np.stack(states, 1)


def measured_and_certified(seed, scale, lam_factor, activation=np.tanh):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((SAMPLES, STEPS, INPUTS))
    weight = scale * rng.standard_normal((WIDTH, WIDTH)) / math.sqrt(WIDTH)
    into, bias = rng.standard_normal((WIDTH, INPUTS)), 0.3 * rng.standard_normal(WIDTH)
    readout = rng.standard_normal((OUTPUTS, WIDTH))
    states = run(inputs, weight, into, bias, activation)
    rows = states.reshape(-1, WIDTH)
    covariance = rows.T @ rows / len(rows)
    lam = lam_factor * float(np.trace(covariance))
    scores = rng.dirichlet(np.full(WIDTH, 3.0))
    nodes = weighted_nodes(rng.permutation(WIDTH)[: int(rng.integers(4, WIDTH))], scores)
    kept, mix = nodes.indices, reconstruction_matrix(covariance, nodes, lam)
    small = run(inputs, weight[kept] @ mix, into[kept], bias[kept], activation)
    difference = states @ readout.T - small @ (readout @ mix).T
    measured = math.sqrt(float((difference**2).sum(-1).mean()))
    bound = recurrent_certificate(
        prune_dense_layer(readout, covariance, nodes, lam),
        prune_dense_layer(weight, covariance, nodes, lam, next_nodes=nodes),
        STEPS,
    )
    rows = math.sqrt(WIDTH) * float(np.linalg.norm(weight, axis=1).max())
    found = feasibility(covariance, nodes, lam)
    prior = recurrent_a_priori(lam, found, float(np.linalg.norm(readout)), rows, STEPS)
    assert bound.value <= prior.value * (1 + 1e-9)  # for any nodes, with the measured c and s
    return measured, bound


@pytest.mark.parametrize("activation", [np.tanh, lambda x: np.maximum(x, 0)])
def test_measured_error_is_below_the_certificate(activation):
    ratios = []
    for seed in range(60):
        measured, bound = measured_and_certified(
            seed, scale=(0.2, 0.7, 1.1)[seed % 3], lam_factor=(1e-1, 1e-3, 1e-6)[seed // 3 % 3], activation=activation
        )
        assert measured <= bound.value * (1 + 1e-9)
        ratios.append(measured / bound.value)
    assert max(ratios) > 0.3  # it can be close: a certificate that lost its readout term would be violated


def test_the_recurrence_term_is_needed():
    # A readout of the kept nodes alone has no error of its own; all of it comes through the recurrence.
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((SAMPLES, STEPS, INPUTS))
    weight, into = 0.9 * rng.standard_normal((WIDTH, WIDTH)) / 4, rng.standard_normal((WIDTH, INPUTS))
    states = run(inputs, weight, into, np.zeros(WIDTH), np.tanh)
    covariance = np.einsum("nti,ntj->ij", states, states) / (SAMPLES * STEPS)
    nodes = weighted_nodes(np.arange(8), np.full(WIDTH, 1 / WIDTH))
    lam = 1e-9
    readout = np.eye(WIDTH)[:4]
    mix = reconstruction_matrix(covariance, nodes, lam)
    small = run(inputs, weight[:8] @ mix, into[:8], np.zeros(8), np.tanh)
    measured = math.sqrt(float(((states @ readout.T - small @ (readout @ mix).T) ** 2).sum(-1).mean()))
    bound = recurrent_certificate(
        prune_dense_layer(readout, covariance, nodes, lam),
        prune_dense_layer(weight, covariance, nodes, lam, next_nodes=nodes),
        STEPS,
    )
    assert bound.terms["readout"] < 1e-3 * measured
    assert measured <= bound.value


def test_value_is_the_formula_written_out():
    bound = recurrent_certificate(PrunedLayer(0.5, 2.0), PrunedLayer(0.1, 3.0), 4)
    assert bound.value == pytest.approx(0.5 + 2.0 * 0.1 * (1 + 3 + 9))
    assert recurrent_certificate(PrunedLayer(0.5, 2.0), PrunedLayer(0.1, 3.0), 1).value == 0.5
    assert recurrent_certificate(PrunedLayer(0.5, 2.0), PrunedLayer(0.1, 0.0), 9).value == pytest.approx(0.7)


def test_a_priori_is_the_formula_written_out():
    found = recurrent_a_priori(0.01, Feasibility(4.0, 1.0, True), 2.0, 1.5, 3)
    assert found.value == pytest.approx(math.sqrt(0.04) * 2.0 * (1 + 3 + 9))
    formula = STATEMENTS["recurrent_a_priori"].lambdify()
    assert found.value == pytest.approx(formula(0.01, 4.0, 1.0, 2.0, 1.5), rel=1e-12)
    certificate = recurrent_certificate(PrunedLayer(0.5, 2.0), PrunedLayer(0.1, 3.0), 3)
    assert certificate.value == pytest.approx(
        STATEMENTS["recurrent_certificate"].lambdify()(0.25, 2.0, 0.01, 3.0), rel=1e-12
    )
    assert recurrent_a_priori(0.01, Feasibility(4.0, 1.0, True), 2.0, 1.5, 3000).value == math.inf
    assert recurrent_a_priori(0.0, Feasibility(4.0, 1.0, True), 2.0, 1.5, 3000).value == 0.0


def test_overflow_is_infinite_and_never_nan():
    assert recurrent_certificate(PrunedLayer(0.5, 2.0), PrunedLayer(0.1, 1e3), 1000).value == math.inf
    assert recurrent_certificate(PrunedLayer(0.5, 2.0), PrunedLayer(0.0, 1e3), 1000).value == 0.5


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="steps"):
        recurrent_certificate(PrunedLayer(0.5, 2.0), PrunedLayer(0.1, 3.0), 0)
    with pytest.raises(ValueError, match=r"recurrence\.gain"):
        recurrent_certificate(PrunedLayer(0.5, 2.0), PrunedLayer(0.1, math.nan), 3)
