"""Spectral pruning of neural networks, and the compression-based generalization bounds behind it.

Four ways to start:

    result = specprune.prune(model, batches, keep=0.3)     # a smaller, ordinary module and a report
    print(specprune.layer_spectra(model, batches))         # degrees of freedom of every layer
    print(specprune.tradeoff(model, train, test))          # bias, variance, bounds and measured errors
    print(specprune.certify(data, minutes=5, out="run"))   # a bound on the test error from the training set alone
"""

from importlib.metadata import PackageNotFoundError, version

from specprune.analysis import bound_table, compare, layer_spectra, tradeoff
from specprune.analysis.certify import certify
from specprune.compress import collect_moments, load_pruned, prune, prune_sweep, save_pruned

try:
    __version__ = version("specprune")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "__version__",
    "bound_table",
    "certify",
    "collect_moments",
    "compare",
    "layer_spectra",
    "load_pruned",
    "prune",
    "prune_sweep",
    "save_pruned",
    "tradeoff",
]
