"""Questions to a trained network and its data: spectra, approximation errors, bound tables, the trade-off curve."""

from specprune.analysis.approximation import Approximation, approximation, output_distance
from specprune.analysis.chain import ChainLayer, trace_chain
from specprune.analysis.coded import OccamResult, occam_results
from specprune.analysis.comparison import METHODS, Comparison, ComparisonPoint, compare
from specprune.analysis.propagation import carried_error
from specprune.analysis.spectra import LayerSpectrum, Spectra, layer_spectra
from specprune.analysis.tightness import BoundTable, bound_table
from specprune.analysis.tradeoff import Tradeoff, TradeoffPoint, tradeoff

__all__ = [
    "METHODS",
    "Approximation",
    "BoundTable",
    "ChainLayer",
    "Comparison",
    "ComparisonPoint",
    "LayerSpectrum",
    "OccamResult",
    "Spectra",
    "Tradeoff",
    "TradeoffPoint",
    "approximation",
    "bound_table",
    "carried_error",
    "compare",
    "layer_spectra",
    "occam_results",
    "output_distance",
    "trace_chain",
    "tradeoff",
]
