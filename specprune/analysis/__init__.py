"""Questions to a trained network and its data: spectra, approximation errors, bound tables, the trade-off curve."""

from specprune.analysis.approximation import Approximation, approximation, output_distance
from specprune.analysis.certificate import Certificate, certificate_of, load_network, save_network, verify
from specprune.analysis.certificate_path import CertificatePath, PathPoint
from specprune.analysis.certified import Certified
from specprune.analysis.chain import ChainLayer, trace_chain
from specprune.analysis.coded import OccamResult, occam_results
from specprune.analysis.comparison import METHODS, Comparison, ComparisonPoint, compare
from specprune.analysis.correlation import conditional_mutual_information, granulated, kendall_tau, sign_error
from specprune.analysis.cover_complexity import CoverComplexity, cover_complexity, smoothness
from specprune.analysis.cushions import Cushions, cushions
from specprune.analysis.decay import NetworkDecay, measure_decay
from specprune.analysis.double_descent import DoubleDescent, double_descent
from specprune.analysis.flatness import FlatSigma, flat_sigma
from specprune.analysis.layer_norms import NetworkNorms, measure_norms
from specprune.analysis.layerwise import layerwise_certificate
from specprune.analysis.linear_simulation import SimulatedRisks, simulate_risks
from specprune.analysis.matrix_projection import MatrixProjection, matrix_projection
from specprune.analysis.measure_ranking import MeasureRanking, rank_measures
from specprune.analysis.measure_table import MeasureTable
from specprune.analysis.measures import MEASURES, NetworkMeasures, measure_table, network_measures
from specprune.analysis.network_descent import NetworkDescent, network_descent
from specprune.analysis.posterior import Posterior, posterior_certificate, train_posterior
from specprune.analysis.propagation import carried_error
from specprune.analysis.prunability import Prunability, prunability, spectral_prunability
from specprune.analysis.small_or_large import SmallOrLarge, small_or_large
from specprune.analysis.spectra import LayerSpectrum, Spectra, layer_spectra
from specprune.analysis.tightness import BoundTable, bound_table
from specprune.analysis.tradeoff import Tradeoff, TradeoffPoint, tradeoff

__all__ = [
    "MEASURES",
    "METHODS",
    "Approximation",
    "BoundTable",
    "Certificate",
    "CertificatePath",
    "Certified",
    "ChainLayer",
    "Comparison",
    "ComparisonPoint",
    "CoverComplexity",
    "Cushions",
    "DoubleDescent",
    "FlatSigma",
    "LayerSpectrum",
    "MatrixProjection",
    "MeasureRanking",
    "MeasureTable",
    "NetworkDecay",
    "NetworkDescent",
    "NetworkMeasures",
    "NetworkNorms",
    "OccamResult",
    "PathPoint",
    "Posterior",
    "Prunability",
    "SimulatedRisks",
    "SmallOrLarge",
    "Spectra",
    "Tradeoff",
    "TradeoffPoint",
    "approximation",
    "bound_table",
    "carried_error",
    "certificate_of",
    "compare",
    "conditional_mutual_information",
    "cover_complexity",
    "cushions",
    "double_descent",
    "flat_sigma",
    "granulated",
    "kendall_tau",
    "layer_spectra",
    "layerwise_certificate",
    "load_network",
    "matrix_projection",
    "measure_decay",
    "measure_norms",
    "measure_table",
    "network_descent",
    "network_measures",
    "occam_results",
    "output_distance",
    "posterior_certificate",
    "prunability",
    "rank_measures",
    "save_network",
    "sign_error",
    "simulate_risks",
    "small_or_large",
    "smoothness",
    "spectral_prunability",
    "trace_chain",
    "tradeoff",
    "train_posterior",
    "verify",
]
