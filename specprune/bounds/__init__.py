"""The theorems: numbers and arrays in, numbers out.

Start with `degrees_of_freedom` (how many dimensions a layer uses), `samples_needed` (how many nodes that asks for),
`approximation_certificate` (how far the output moves) and `occam_bound` (what that promises on new data).  Every bound
is a `Bound`: its value, its additive terms, its measured hypotheses, and whether it says anything at all.
"""

from specprune.bounds.bound import Bound, Hypothesis
from specprune.bounds.correlated_features import (
    CorrelatedProblem,
    ReluFeatures,
    correlated_law,
    correlated_risks,
    rank_one_risks,
)
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
from specprune.bounds.gaussian_posterior import dziugaite_roy_bound, gaussian_kl, monte_carlo_error
from specprune.bounds.held_out import chernoff_bound, clopper_pearson_bound, hoeffding_bound
from specprune.bounds.low_rank import DecayFit, SpectralLayer, fit_decay, low_rank_bound, rank_profile, truncation_error
from specprune.bounds.low_rank_error import layer_error_bound
from specprune.bounds.nodes import (
    Feasibility,
    WeightedNodes,
    feasibility,
    reconstruction_matrix,
    residual_covariance,
    sample_nodes,
    weighted_nodes,
)
from specprune.bounds.noise_stability import (
    CompressedSize,
    StableLayer,
    compressed_size,
    noise_stability_measure,
    projections_needed,
)
from specprune.bounds.norms import InputNorms, LayerNorms, dense_norms, layer_norms
from specprune.bounds.norms_pac_bayes import margin_error, neyshabur_2018_bound
from specprune.bounds.norms_rademacher import bartlett_bound, golowich_bound, neyshabur_2015_bound, neyshabur_2019_bound
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
from specprune.bounds.overparameterized import LinearProblem, least_squares_law
from specprune.bounds.pac_bayes import (
    catoni_bound,
    catoni_grid_bound,
    compression_bound,
    langford_seeger_bound,
    maurer_bound,
    mcallester_bound,
    quadratic_bound,
    thiemann_bound,
)
from specprune.bounds.pruned_risks import PrunedRisks, pruned_risks
from specprune.bounds.recurrent import recurrent_a_priori, recurrent_certificate
from specprune.bounds.sensitivity_sampling import dropping_error_bound, new_input_bound, sampling_error_bound
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
from specprune.bounds.symbolic_overparameterized import isotropic_formulas, large_beats_small
from specprune.bounds.symbolic_uncompressed import RATES, evaluate_rates, rates_latex, rates_records
from specprune.bounds.uncompressed import (
    LossPair,
    coded_disagreement_bound,
    disagreement_bound,
    loss_pair,
    pair_bound,
    uncompressed_bound,
)

__all__ = [
    "RATES",
    "STATEMENTS",
    "Bound",
    "CompressedSize",
    "CorrelatedProblem",
    "DecayFit",
    "Feasibility",
    "Hypothesis",
    "InputNorms",
    "LayerNorms",
    "LayerSize",
    "LinearProblem",
    "LossPair",
    "PolynomialRate",
    "PowerLaw",
    "PrunedLayer",
    "PrunedRisks",
    "Quantised",
    "ReluFeatures",
    "SpectralLayer",
    "StableLayer",
    "Statement",
    "WeightedNodes",
    "approximation_a_priori",
    "approximation_certificate",
    "bartlett_bound",
    "binary_kl",
    "catoni_bound",
    "catoni_grid_bound",
    "chernoff_bound",
    "clopper_pearson_bound",
    "coded_disagreement_bound",
    "compressed_size",
    "compression_bound",
    "correlated_law",
    "correlated_risks",
    "covering_bound",
    "degrees_of_freedom",
    "dense_norms",
    "disagreement_bound",
    "dropping_error_bound",
    "dudley_bound",
    "dziugaite_roy_bound",
    "effective_rank",
    "eigenvalues",
    "evaluate_rates",
    "feasibility",
    "fit_decay",
    "fit_power_law",
    "gaussian_kl",
    "golowich_bound",
    "hoeffding_bound",
    "inverse_degrees_of_freedom",
    "invert_binary_kl",
    "isotropic_formulas",
    "langford_seeger_bound",
    "large_beats_small",
    "layer_error_bound",
    "layer_norms",
    "least_squares_law",
    "leverage_scores",
    "loss_pair",
    "low_rank_bound",
    "margin_error",
    "margin_transfer",
    "maurer_bound",
    "mcallester_bound",
    "monte_carlo_error",
    "network_code_length",
    "new_input_bound",
    "neyshabur_2015_bound",
    "neyshabur_2018_bound",
    "neyshabur_2019_bound",
    "noise_stability_measure",
    "occam_bound",
    "occam_bound_relaxed",
    "optimal_polynomial_width",
    "pair_bound",
    "paper_width",
    "polynomial_rate",
    "power_law_constant",
    "power_law_degrees_of_freedom",
    "projections_needed",
    "prune_dense_layer",
    "pruned_risks",
    "quadratic_bound",
    "quantise",
    "ramp_loss",
    "rank_one_risks",
    "rank_profile",
    "rates_latex",
    "rates_records",
    "reconstruction_matrix",
    "recurrent_a_priori",
    "recurrent_certificate",
    "residual_covariance",
    "row_norm_bound",
    "sample_nodes",
    "samples_needed",
    "sampling_error_bound",
    "sampling_failure_probability",
    "tensor_code_length",
    "thiemann_bound",
    "truncation_error",
    "uncompressed_bound",
    "weighted_nodes",
]
