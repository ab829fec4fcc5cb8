"""Questions to a trained network and its data: spectra, approximation errors, bound tables, the trade-off curve."""

from specprune.analysis.approximation import Approximation, approximation, output_distance
from specprune.analysis.certificate import Certificate, certificate_of, load_network, save_network, verify
from specprune.analysis.certificate_path import CertificatePath, PathPoint
from specprune.analysis.certified import Certified
from specprune.analysis.chain import ChainLayer, trace_chain
from specprune.analysis.coded import OccamResult, occam_results
from specprune.analysis.comparison import METHODS, Comparison, ComparisonPoint, compare
from specprune.analysis.cushions import Cushions, cushions
from specprune.analysis.decay import NetworkDecay, measure_decay
from specprune.analysis.double_descent import DoubleDescent, double_descent
from specprune.analysis.layer_norms import NetworkNorms, measure_norms
from specprune.analysis.layerwise import layerwise_certificate
from specprune.analysis.linear_simulation import SimulatedRisks, simulate_risks
from specprune.analysis.matrix_projection import MatrixProjection, matrix_projection
from specprune.analysis.network_descent import NetworkDescent, network_descent
from specprune.analysis.posterior import Posterior, posterior_certificate, train_posterior
from specprune.analysis.propagation import carried_error
from specprune.analysis.small_or_large import SmallOrLarge, small_or_large
from specprune.analysis.spectra import LayerSpectrum, Spectra, layer_spectra
from specprune.analysis.tightness import BoundTable, bound_table
from specprune.analysis.tradeoff import Tradeoff, TradeoffPoint, tradeoff

__all__ = [
    "METHODS",
    "Approximation",
    "BoundTable",
    "Certificate",
    "CertificatePath",
    "Certified",
    "ChainLayer",
    "Comparison",
    "ComparisonPoint",
    "Cushions",
    "DoubleDescent",
    "LayerSpectrum",
    "MatrixProjection",
    "NetworkDecay",
    "NetworkDescent",
    "NetworkNorms",
    "OccamResult",
    "PathPoint",
    "Posterior",
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
    "cushions",
    "double_descent",
    "layer_spectra",
    "layerwise_certificate",
    "load_network",
    "matrix_projection",
    "measure_decay",
    "measure_norms",
    "network_descent",
    "occam_results",
    "output_distance",
    "posterior_certificate",
    "save_network",
    "simulate_risks",
    "small_or_large",
    "trace_chain",
    "tradeoff",
    "train_posterior",
    "verify",
]
