"""Measures made of spectra and of compression: degrees of freedom, Kolmogorov widths, code lengths, pruned bounds.

The spectra are those of the hidden nodes, on the training set; the first layer reads the data, which say nothing of the
network.  N_l(lambda) is taken at the relative lambda, lambda Tr Sigma_l, so that rescaling a layer changes nothing.
"""

from __future__ import annotations

import math

from specprune.analysis.chain import trace_chain
from specprune.analysis.cushions import cushions
from specprune.analysis.margin_bounds import covering_bounds, input_norm
from specprune.analysis.measured_network import Measure, MeasuredNetwork, as_measure, measures_in
from specprune.analysis.norm_measures import root
from specprune.analysis.spectra import LayerSpectrum
from specprune.bounds.noise_stability import StableLayer, noise_stability_measure

SUZUKI = "Suzuki et al. 2020, arXiv:1808.08558"
_LAMBDAS = (1e-2, 1e-3, 1e-4, 1e-6)
_SHARE_LAMBDA = 1e-3
_DIMENSIONS = 5


def _hidden(net: MeasuredNetwork) -> list[LayerSpectrum]:
    spectra = list(net.spectra.values())[1:]
    if not spectra:
        raise ValueError("a network of one layer has no hidden nodes, and no spectra of them")
    return spectra


def _degrees(lam: float) -> Measure:
    def total(net: MeasuredNetwork) -> float:
        return root(sum(layer.degrees_of_freedom(lam) for layer in _hidden(net)), net.samples)

    exponent = round(math.log10(lam))
    return Measure(
        f"dof_1e{exponent}",
        f"Degrees of freedom of all hidden layers at lambda = 1e{exponent} of the trace",
        rf"\sqrt{{\sum_l N_l(10^{{{exponent}}} \mathrm{{Tr}}\, \Sigma_l) / m}}",
        True,
        "pass",
        "",
        SUZUKI,
        total,
    )


DOF_MEASURES = tuple(_degrees(lam) for lam in _LAMBDAS)


@as_measure(r"\sum_l N_l(10^{-3} \mathrm{Tr}\, \Sigma_l) / \sum_l m_l", SUZUKI, cost="pass")
def dof_share(net: MeasuredNetwork) -> float:
    """Share of the hidden nodes that their degrees of freedom make up."""
    hidden = _hidden(net)
    return sum(layer.degrees_of_freedom(_SHARE_LAMBDA) for layer in hidden) / sum(layer.width for layer in hidden)


@as_measure(r"\sqrt{\sum_l \exp H_l / m}", "Roy and Vetterli 2007 (effective rank)", cost="pass")
def effective_rank(net: MeasuredNetwork) -> float:
    """Effective ranks of all hidden layers, exponentials of the entropies of their spectra."""
    return root(sum(layer.effective_rank for layer in _hidden(net)), net.samples)


@as_measure(r"\sqrt{\sum_l N_l N_{l+1} / m}", SUZUKI, cost="pass")
def spectral_params(net: MeasuredNetwork) -> float:
    """Weights of a network whose hidden widths are their degrees of freedom: the variance of the compressed network."""
    kept = [layer.degrees_of_freedom(_SHARE_LAMBDA) for layer in _hidden(net)]
    shares = [1.0, *(n / layer.width for n, layer in zip(kept, _hidden(net), strict=True)), 1.0]
    sizes = [matrix.size for matrix in net.matrices]
    if len(sizes) != len(shares) - 1:
        raise ValueError("some layers do not run on the training set, so the network has no widths in a row")
    return root(sum(size * a * b for size, a, b in zip(sizes, shares, shares[1:], strict=False)), net.samples)


@as_measure(
    r"\sum_l \Lambda_l(5) / \Lambda_l(0)", "Long and Wu 2021, arXiv:2108.04964, on the network's own nodes", cost="pass"
)
def kolmogorov_tail(net: MeasuredNetwork) -> float:
    """Energy of the hidden nodes that five dimensions a layer cannot hold, as a share, over all layers."""
    return sum(float(layer.eigenvalues[_DIMENSIONS:].sum()) / layer.trace for layer in _hidden(net))


@as_measure(r"\sqrt{b / m}", "here (Occam's bound on the rounded network)", cost="pass")
def certificate_bits(net: MeasuredNetwork) -> float:
    """Bits b that describe the network, rounded as suits Occam's bound best."""
    return root(net.code.bits, net.samples)


@as_measure(
    r"\min_{W^\sharp} \mathrm{kl}^{-1}(\hat L(W^\sharp), (b^\sharp \ln 2 + \ln 20) / m)", SUZUKI, cost="pruning"
)
def compression_bound(net: MeasuredNetwork) -> float:
    """Occam's bound on the best of the networks pruned spectrally and rounded, at 95 %."""
    return net.pruned_code.bound


@as_measure(r"\hat L(W^\sharp)", SUZUKI, cost="pruning")
def compression_bias(net: MeasuredNetwork) -> float:
    """Training error of the pruned, rounded network with the smallest bound: what compression costs."""
    return net.pruned_code.train_error


@as_measure(r"\sqrt{(b^\sharp \ln 2 + \ln 20) / (2 m)}", SUZUKI, cost="pruning")
def compression_variance(net: MeasuredNetwork) -> float:
    """Length of the pruned, rounded network with the smallest bound, on the scale of an error."""
    return net.pruned_code.complexity


@as_measure(
    r"\ln \text{(Theorem C: one network's own covering bound)}", f"{SUZUKI}, constants derived here", cost="pass"
)
def log_covering_bound(net: MeasuredNetwork) -> float:
    """Logarithm of the covering bound (Dudley's integral) at the margin that suits it best."""
    _, dudley = covering_bounds(
        trace_chain(net.folded, net.data),
        net.logits,
        net.targets.cpu().numpy(),
        0.0,
        input_radius=None,
        measured_radius=input_norm(net.data, net.folded),
        original_widths=[],
        delta=0.05,
    )
    return math.log(dudley.value)


@as_measure(
    r"\ln(c d \max_x \|f(x)\| (\sum_i o_i / (\mu_i \mu_{i \to})^2)^{1/2} / (\gamma \sqrt m))",
    "Arora et al. 2018, arXiv:1802.05296, without constants and logarithms",
    cost="pass",
)
def log_noise_stability(net: MeasuredNetwork) -> float:
    """Cushions (5 % quantiles over the data), contraction and margin: how noise in a layer dies out on its way up."""
    found = cushions(net.folded, net.data, seed=net.seed)
    layers = [
        StableLayer(layer.weights, layer.outputs, layer.cushion_quantile, layer.forward_cushion_quantile, layer.overlap)
        for layer in found.layers
    ]
    value = noise_stability_measure(
        layers,
        contraction=found.contraction,
        output_norm=found.output_norm,
        gamma=net.margin,
        n=net.samples,
    )
    return math.log(value) if value > 0 else -math.inf


SPECTRAL_MEASURES: tuple[Measure, ...] = (*DOF_MEASURES, *measures_in(globals()))
