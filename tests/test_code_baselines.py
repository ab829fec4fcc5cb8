"""Baselines: their codes, their errors, and that they learn at all."""

import json

import pytest
from test_code_training import SMALL, halves

from specprune.analysis.code_baselines import float_baseline, subspace_baseline
from specprune.analysis.code_training import training_images
from specprune.bounds.code_length import code_length_limit


def images(n=800):
    return training_images(SMALL, *halves(n))


def test_float_baseline_charges_32_bits_a_weight():
    found = float_baseline(SMALL, images(), epochs=6, batch=20)
    assert found.weights == 3 * 9 + 2 * 3 * 16
    assert found.bits == 32 * found.weights
    assert found.train_error < 0.12
    assert found.value == code_length_limit(found.errors, 800, found.bits, 0.05) > 0.9
    json.dumps(found.to_records())


@pytest.mark.slow
def test_random_subspace_learns_within_its_code():
    data = images()
    found = {d: subspace_baseline(SMALL, data, d, epochs=16, batch=20) for d in (2, 30)}
    for dimension, one in found.items():
        assert one.value == code_length_limit(one.errors, 800, one.bits, 0.05)
        assert one.dimension == dimension
        assert one.bits < 5 * dimension + 30
        assert one == subspace_baseline(SMALL, data, dimension, epochs=16, batch=20)
    assert found[30].errors < found[2].errors
    assert found[30].train_error < 0.25
    with pytest.raises(ValueError, match="dimension"):
        subspace_baseline(SMALL, data, 0, epochs=1)
