"""The theorems: numbers and arrays in, numbers out.

Start with `degrees_of_freedom` (how many dimensions a layer uses), `samples_needed` (how many nodes that asks for),
`approximation_certificate` (how far the output moves) and `occam_bound` (what that promises on new data).  Every bound
is a `Bound`: its value, its additive terms, its measured hypotheses, and whether it says anything at all.
"""

from specprune.bounds.bound import Bound, Hypothesis
from specprune.bounds.covering import LayerSize, covering_bound, dudley_bound, optimal_polynomial_width, ramp_loss
from specprune.bounds.degrees_of_freedom import (
    PowerLaw,
    degrees_of_freedom,
    effective_rank,
    eigenvalues,
    fit_power_law,
    inverse_degrees_of_freedom,
    leverage_scores,
    power_law_degrees_of_freedom,
)
from specprune.bounds.nodes import (
    Feasibility,
    WeightedNodes,
    feasibility,
    reconstruction_matrix,
    residual_covariance,
    sample_nodes,
    weighted_nodes,
)
from specprune.bounds.occam import (
    Quantised,
    binary_kl,
    invert_binary_kl,
    network_code_length,
    occam_bound,
    occam_bound_relaxed,
    quantise,
    tensor_code_length,
)
from specprune.bounds.spectral import (
    PrunedLayer,
    approximation_a_priori,
    approximation_certificate,
    margin_transfer,
    paper_width,
    prune_dense_layer,
    row_norm_bound,
    samples_needed,
    sampling_failure_probability,
)
from specprune.bounds.statement import Statement
from specprune.bounds.symbolic import (
    STATEMENTS,
    PolynomialRate,
    polynomial_rate,
    power_law_constant,
)

__all__ = [
    "STATEMENTS",
    "Bound",
    "Feasibility",
    "Hypothesis",
    "LayerSize",
    "PolynomialRate",
    "PowerLaw",
    "PrunedLayer",
    "Quantised",
    "Statement",
    "WeightedNodes",
    "approximation_a_priori",
    "approximation_certificate",
    "binary_kl",
    "covering_bound",
    "degrees_of_freedom",
    "dudley_bound",
    "effective_rank",
    "eigenvalues",
    "feasibility",
    "fit_power_law",
    "inverse_degrees_of_freedom",
    "invert_binary_kl",
    "leverage_scores",
    "margin_transfer",
    "network_code_length",
    "occam_bound",
    "occam_bound_relaxed",
    "optimal_polynomial_width",
    "paper_width",
    "polynomial_rate",
    "power_law_constant",
    "power_law_degrees_of_freedom",
    "prune_dense_layer",
    "quantise",
    "ramp_loss",
    "reconstruction_matrix",
    "residual_covariance",
    "row_norm_bound",
    "sample_nodes",
    "samples_needed",
    "sampling_failure_probability",
    "tensor_code_length",
    "weighted_nodes",
]
