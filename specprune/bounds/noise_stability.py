"""How many numbers a noise-stable network can be squeezed into: random sign matrices, and cushions against noise.

Matrix projection.  Replace a matrix A by A^ = (1/k) sum_l <A, M_l> M_l with k matrices M_l of independent random signs:
k numbers and a seed.  A^ is right on average, and for any fixed vectors u, v

    P( |u^T (A^ - A) v| > epsilon ||A||_F ||u|| ||v|| ) <= 2 exp(-(k/2) (epsilon - ln(1 + epsilon))).

Proof.  Scale to unit a = A/||A||_F and b = u v^T/(||u|| ||v||), rho = <a, b>, and let M be one matrix of signs.

1. With S = <a+b, M>^2/sigma, T = <a-b, M>^2/tau, sigma = ||a+b||^2 = 2 + 2 rho, tau = 2 - 2 rho, polarisation gives <a,
   M><b, M> - rho = (sigma/4)(S - 1) - (tau/4)(T - 1).  As sigma/4 + tau/4 = 1, Hoelder's inequality gives ln E exp(t
   (<a, M><b, M> - rho)) <= (sigma/4) ln E exp(t (S - 1)) + (tau/4) ln E exp(-t (T - 1)) for t >= 0.
2. Upper part: exp(t s^2) is a Gaussian average of exp(sqrt(2t) g s), and signs have cosh(x) <= exp(x^2/2), so E exp(t
   S) <= (1 - 2t)^(-1/2), hence ln E exp(t (S - 1)) <= psi(t) = -ln(1 - 2t)/2 - t for 0 <= t < 1/2.
3. Lower part: exp(-x) <= 1 - x + x^2/2 and E T^2 <= 3 give ln E exp(-t (T - 1)) <= t + ln(1 - t + 3t^2/2), which is
   below psi(t): both vanish at 0, and the slopes differ by (t^2/2 + 6t^3) / ((1 - 2t)(1 - t + 3t^2/2)) >= 0.
4. So the logarithm is at most psi(t); Chernoff with t = epsilon / (2 (1 + epsilon)), and b -> -b for the other side.

The k that makes this eta is 2 ln(2/eta) / (epsilon - ln(1 + epsilon)), about 4 ln(2/eta)/epsilon^2.  The factor 4
cannot be improved: for u v^T along A with many entries the variance is 2/k.  The size ln(1/eta)/epsilon^2, as the
source's is remembered, does not keep its promise (the tests show it).

Layer by layer.  x^i = A^i phi(x^{i-1}) + b^i for i = 1..d, phi anything with Lipschitz constant L_i and phi(0) free;
J^{i,j} the Jacobian of the map M^{i,j} from x^i to x^j, at the original x^i.  On every sample let

    mu_i <= ||x^i|| / (||A^i||_F ||phi(x^{i-1})||),      mu_{i,j} <= ||x^j|| / (||J^{i,j}||_F ||x^i||),
    mu_{i->} = min(1/sqrt(h_i), min_{j>i} mu_{i,j}),     c >= L_i ||x^i|| / ||phi(x^i)||,
    ||M^{i,j}(x^i + z) - x^j - J^{i,j} z|| <= ||z|| ||x^j|| / (rho ||x^i||)   for the z that compression makes.

For ReLU networks without biases, J^{i,j} x^i = x^j, and these are the cushions of the source; with biases they are what
the proof needs.  Lemma.  If rho >= 3d and every A^i is projected with epsilon_i = epsilon mu_i mu_{i->} / (3 d
sqrt(o_i) (1 + c epsilon)) and eta = delta/N, N = n sum_i sum_{j>=i} h_j, then with probability 1 - delta over the signs
||f^(x) - f(x)|| <= epsilon ||f(x)|| on all n samples.

Proof.  Replace layers 1..i, one after the other; claim: x^j is then off by at most (i/d) epsilon ||x^j||, for all j >=
i. Replacing layer i adds D v to x^i, with D = A^ - A and v = phi of the input it sees, ||v|| <= (1 + c epsilon)
||phi(x^{i-1})|| by the claim for i - 1; v depends on the signs of other layers only.  So, conditionally, for each row u
of J^{i,j} |u D v| <= epsilon_i ||A^i||_F ||u|| ||v||; together ||J^{i,j} D v|| <= epsilon_i ||A^i||_F ||J^{i,j}||_F
||v|| <= epsilon ||x^j||/(3d) (for j = i take J = 1).  The remainders of the two linearisations add at most (2i - 1)
epsilon ||x^j||/(d rho) < 2 epsilon ||x^j||/(3d).  The sum is at most epsilon ||x^j||/d.  In a convolution u^T D v = <D,
U V^T> with U the map u as channels times pixels and V the patches of v, and ||U V^T||_F <= ||u|| sqrt(o) ||v||, where o
says in how many patches a pixel is: this is what sqrt(o_i) pays for, and no well-distributedness of the Jacobian is
needed.

What it is good for.  The lemma counts real numbers, not bits, and rho is measured under Gaussian noise rather than
under the compressor's; so `compressed_size` is a COMPLEXITY MEASURE, form after the source, and no bound on an error.
The valid bound is `specprune.analysis.matrix_projection`: it writes the compressed network down and pays for it with
``specprune.bounds.projection_code``.

Source: Arora, Ge, Neyshabur and Zhang 2018 (arXiv:1802.05296) for the idea and the definitions; proofs and constants
are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specprune._records import format_table, to_json
from specprune.bounds.bound import Hypothesis, Record, check_count, check_number

_SMALLEST_ACCURACY = 1e-150  # below it, epsilon^2 leaves the normal floats


def _excess(epsilon: float) -> float:
    """Return epsilon - ln(1 + epsilon) without losing digits where epsilon is small."""
    if epsilon > 0.01:
        return epsilon - math.log1p(epsilon)
    return epsilon**2 * math.fsum((-epsilon) ** power / (power + 2) for power in range(8))


def projection_failure(epsilon: float, k: int) -> float:
    """Return the probability that k random sign matrices miss one number u^T A v by more than epsilon.

    min(1, 2 exp(-(k/2) (epsilon - ln(1 + epsilon)))), epsilon in units of ||A||_F ||u|| ||v||.

    Args:
        epsilon: relative accuracy, positive (it may exceed 1).
        k: number of sign matrices.

    Returns:
        An upper bound on the probability.

    Raises:
        ValueError: if an input is out of range.

    Source: after Arora et al. 2018 (arXiv:1802.05296); constants derived in the module's docstring.
    """
    epsilon = check_number("epsilon", epsilon, 0.0, open_low=True)
    return min(1.0, 2 * math.exp(-check_count("k", k) / 2 * _excess(epsilon)))


def projections_needed(epsilon: float, eta: float) -> int:
    """Return how many random sign matrices make one number u^T A v accurate to epsilon with probability 1 - eta.

    k = ceil(2 ln(2/eta) / (epsilon - ln(1 + epsilon))), about 4 ln(2/eta) / epsilon^2.

    Args:
        epsilon: relative accuracy in units of ||A||_F ||u|| ||v||, at least 1e-150.
        eta: allowed probability of failure, in (0, 1).

    Returns:
        k >= 1.

    Raises:
        ValueError: if an input is out of range.

    Source: after Arora et al. 2018 (arXiv:1802.05296); constants derived in the module's docstring.
    """
    epsilon = check_number("epsilon", epsilon, _SMALLEST_ACCURACY)
    eta = check_number("eta", eta, 0.0, 1.0, open_low=True, open_high=True)
    # ln 2 - ln eta: 2 / eta would overflow for the tiniest eta
    return max(1, math.ceil(2 * (math.log(2) - math.log(eta)) / _excess(epsilon)))


@dataclass(frozen=True)
class StableLayer:
    """One layer as the compression lemma sees it.

    Attributes:
        weights: number of weights of A^i.
        outputs: h_i, numbers in the layer's output (of a convolution: channels times pixels).
        layer_cushion: mu_i, the smallest over the samples; at most 1 without biases, +inf if A^i sees only zeros.
        interlayer_cushion: min over j > i of mu_{i,j}; +inf for the last layer.  1/sqrt(h_i) is applied here.
        overlap: o_i, in how many patches an input pixel is, at most; 1 for dense layers.
    """

    weights: int
    outputs: int
    layer_cushion: float
    interlayer_cushion: float = math.inf
    overlap: int = 1

    def __post_init__(self) -> None:
        for name in ("weights", "outputs", "overlap"):
            check_count(name, getattr(self, name))
        for name in ("layer_cushion", "interlayer_cushion"):
            if getattr(self, name) != math.inf:
                check_number(name, getattr(self, name), 0.0)

    @property
    def forward_cushion(self) -> float:
        """mu_{i->} = min(1/sqrt(h_i), min_{j>i} mu_{i,j})."""
        return min(1 / math.sqrt(self.outputs), self.interlayer_cushion)


@dataclass(frozen=True)
class CompressedSize(Record):
    """How many numbers the compression lemma asks for: a complexity measure, not a bound on an error.

    Attributes:
        epsilon: relative accuracy of the outputs.
        delta: probability that random signs fail.
        accuracies: epsilon_i of each layer.
        sizes: k_i of each layer; +inf where a cushion is zero.
        weights: number of weights of each layer.
        hypotheses: what the lemma assumes.
    """

    epsilon: float
    delta: float
    accuracies: tuple[float, ...]
    sizes: tuple[float, ...]
    weights: tuple[int, ...]
    hypotheses: tuple[Hypothesis, ...] = ()

    @property
    def total(self) -> float:
        """The count of the lemma: q = sum k_i."""
        return math.fsum(self.sizes) if math.inf not in self.sizes else math.inf

    @property
    def useful(self) -> float:
        """Sum of min(k_i, weights_i): a layer that would grow is better left as it is."""
        return math.fsum(min(k, count) for k, count in zip(self.sizes, self.weights, strict=True))

    @property
    def valid(self) -> bool:
        """Whether every hypothesis of the lemma holds, as far as measured."""
        return all(hypothesis.holds for hypothesis in self.hypotheses)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a layer."""
        rows = zip(self.accuracies, self.sizes, self.weights, strict=True)
        return [
            {"layer": index, "epsilon_i": accuracy, "k_i": k, "weights": count, "k_i/weights": k / count}
            for index, (accuracy, k, count) in enumerate(rows, start=1)
        ]

    def to_json(self) -> str:
        """Return layers, totals and hypotheses as strict JSON text."""
        return to_json(
            {
                "epsilon": self.epsilon,
                "delta": self.delta,
                "total": self.total,
                "useful": self.useful,
                "weights": sum(self.weights),
                "valid": self.valid,
                "layers": self.to_records(),
                "hypotheses": [{"statement": h.statement, "value": h.value, "holds": h.holds} for h in self.hypotheses],
            }
        )

    def __str__(self) -> str:
        title = f"complexity measure (no bound): {self.total:.4g} numbers for {sum(self.weights)} weights, "
        title += f"epsilon = {self.epsilon:.4g}"
        notes = [f"{'holds' if h.holds else 'BROKEN'}: {h.statement}" for h in self.hypotheses]
        return "\n".join([format_table(self.to_records(), title=title), *notes])


def margin_accuracy(gamma: float, output_norm: float) -> float:
    """Return the relative accuracy at which no margin of gamma can turn negative: gamma / (sqrt(2) max ||f(x)||).

    A margin is sqrt(2)-Lipschitz in the logits, so ||f^ - f|| <= epsilon ||f|| moves it by at most gamma, and the 0-1
    error of f^ is at most the share of samples on which f has a margin of at most gamma.

    Args:
        gamma: margin in logit units, positive.
        output_norm: largest ||f(x)|| on the samples, positive.

    Returns:
        epsilon.

    Raises:
        ValueError: if an input is out of range.

    Source: derived here.
    """
    gamma = check_number("gamma", gamma, 0.0, open_low=True)
    return gamma / (math.sqrt(2) * check_number("output_norm", output_norm, 0.0, open_low=True))


def layer_accuracies(layers: Sequence[StableLayer], contraction: float, epsilon: float) -> tuple[float, ...]:
    """Return how accurately each matrix must be kept: epsilon mu_i mu_{i->} / (3 d sqrt(o_i) (1 + c epsilon)).

    Args:
        layers: the d layers, input side first.
        contraction: c, at least 0; +inf if an activation maps a sample to zero.
        epsilon: relative accuracy of the outputs, positive.

    Returns:
        epsilon_i of each layer; 0 where a cushion is 0, +inf where the layer sees only zeros.

    Raises:
        ValueError: if there is no layer or an input is out of range.

    Source: after Arora et al. 2018 (arXiv:1802.05296), their compression lemma; constants derived here.
    """
    if not layers:
        raise ValueError("layers must hold at least one StableLayer")
    epsilon = check_number("epsilon", epsilon, 0.0, open_low=True)
    if contraction != math.inf:
        contraction = check_number("contraction", contraction, 0.0)
    share = epsilon / (3 * len(layers) * (1 + contraction * epsilon))
    return tuple(
        # 0 times infinity: a layer that sees only zeros may be anything
        math.inf
        if layer.layer_cushion == math.inf
        else share * layer.layer_cushion * layer.forward_cushion / math.sqrt(layer.overlap)
        for layer in layers
    )


def compressed_size(
    layers: Sequence[StableLayer],
    *,
    contraction: float,
    smoothness: float,
    n: int,
    epsilon: float,
    delta: float,
) -> CompressedSize:
    """Return how many numbers keep the outputs on n samples within epsilon ||f(x)||, by the compression lemma.

    k_i = ceil(2 ln(2N/delta) / (epsilon_i - ln(1 + epsilon_i))), epsilon_i from `layer_accuracies`, N = n sum_i
    sum_{j>=i} h_j.  For small epsilon_i this is 144 (1 + c epsilon)^2 d^2 ln(2N/delta) o_i / (epsilon mu_i mu_{i->})^2:
    the form of the source, with constants that are proved.

    Args:
        layers: the layers, input side first.
        contraction: c.
        smoothness: rho, as measured; the lemma needs rho >= 3d for the perturbations of the compression itself.
        n: number of samples on which the outputs must stay.
        epsilon: relative accuracy of the outputs; `margin_accuracy` gives one from a margin.
        delta: probability with which random signs may fail, in (0, 1).

    Returns:
        A `CompressedSize`: a complexity measure, form after the source; not a bound on an error.

    Raises:
        ValueError: if an input is out of range.

    Source: Arora et al. 2018 (arXiv:1802.05296), compressed size; constants derived in the module's docstring.
    """
    accuracies = layer_accuracies(layers, contraction, epsilon)
    n = check_count("n", n)
    delta = check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    if smoothness != math.inf:
        smoothness = check_number("smoothness", smoothness, 0.0)
    # Layer j is watched while layers 1..j are replaced: sum_i sum_{j>=i} h_j = sum_j j h_j.
    events = n * sum(depth * layer.outputs for depth, layer in enumerate(layers, start=1))
    eta = delta / events
    sizes = tuple(
        1.0 if accuracy == math.inf else _size(accuracy, eta) if accuracy > 0 else math.inf for accuracy in accuracies
    )
    needed = 3 * len(layers)
    statement = f"interlayer smoothness rho >= 3d = {needed} (measured under Gaussian noise, not the compressor's)"
    return CompressedSize(
        epsilon=float(epsilon),
        delta=delta,
        accuracies=accuracies,
        sizes=sizes,
        weights=tuple(layer.weights for layer in layers),
        hypotheses=(Hypothesis(statement, smoothness, smoothness >= needed),),
    )


def _size(accuracy: float, eta: float) -> float:
    return float(projections_needed(accuracy, eta)) if accuracy >= _SMALLEST_ACCURACY else math.inf


def noise_stability_measure(
    layers: Sequence[StableLayer], *, contraction: float, output_norm: float, gamma: float, n: int
) -> float:
    """Return the complexity measure of the source without constants and logarithms, to rank networks by.

    sqrt( c^2 d^2 max_x ||f(x)||^2 sum_i o_i / (mu_i mu_{i->})^2 / (gamma^2 n) ).

    Args:
        layers: the layers, input side first.
        contraction: c.
        output_norm: max ||f(x)||, in logit units.
        gamma: margin, positive, in logit units.
        n: number of training examples.

    Returns:
        The measure, without unit; +inf where a cushion is zero.  NOT a bound: the O-tilde of the source hides factors.

    Raises:
        ValueError: if an input is out of range.

    Source: Arora et al. 2018 (arXiv:1802.05296), main theorem, form recalled; the overlap o_i stands for the source's
        ceil(kernel/stride)^2, and its well-distributedness constant is left out, for the proof here does not need it.
    """
    if not layers:
        raise ValueError("layers must hold at least one StableLayer")
    if contraction != math.inf:
        contraction = check_number("contraction", contraction, 0.0)
    gamma = check_number("gamma", gamma, 0.0, open_low=True)
    norm = check_number("output_norm", output_norm, 0.0)
    n = check_count("n", n)
    live = [layer for layer in layers if layer.layer_cushion != math.inf]
    if not live or contraction == 0 or norm == 0:
        return 0.0
    if contraction == math.inf or any(layer.layer_cushion * layer.forward_cushion == 0 for layer in live):
        return math.inf
    # Each layer's term is a norm of a product; hypot adds the squares without overflow.
    terms = [math.sqrt(layer.overlap) / layer.layer_cushion / layer.forward_cushion for layer in live]
    return contraction * len(layers) * (norm / gamma) * (math.hypot(*terms) / math.sqrt(n))
