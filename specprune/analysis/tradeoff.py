"""The trade-off of the theory on a trained network: as the width grows, bias falls and variance rises."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from tqdm import tqdm

from specprune._records import format_table, to_json
from specprune.analysis.approximation import approximation, patch_moments
from specprune.analysis.chain import trace_chain
from specprune.analysis.coded import occam_results
from specprune.analysis.evaluation import collect_logits, error_rate, root_mean_square
from specprune.analysis.margin_bounds import covering_bounds, input_norm
from specprune.compress import CalibrationData, Moments, Pruned, collect_moments, prune
from specprune.compress.batches import Forward
from specprune.compress.cost import smallest_fraction
from specprune.compress.moments import check_finite_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

KEEP_GRID = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_COLUMNS = (
    "flops_kept",
    "widths",
    "c_max",
    "s_max",
    "measured",
    "layerwise",
    "certificate",
    "a_priori",
    "a_priori_holds",
    "bias",
    "variance",
    "bound",
    "train_error",
    "test_error",
    "refit_test_error",
)


@dataclass(frozen=True)
class TradeoffPoint:
    """One pruned network on the curve.

    `measured` is ||f - f#||_n in logit units; `layerwise`, `certificate` and `a_priori` are bounds on it; `bias`,
    `variance` and `bound` are error rates (Theorem A: bias is the training error of the pruned, rounded network,
    variance what its length costs); `margin_*` are the terms of the covering bound (Theorem C), error rates too,
    usually above 1.

    Args:
        flops_kept: fraction of the FLOPs kept.
        params: number of parameters.
        widths: kept nodes of every group.
        dof: degrees of freedom N(lambda_l) of every group.
        lams: lambda_l of every group, in units of its covariance.
        c_max: largest c over the groups; the a-priori bound with theory constants asks for c <= 4.
        s_max: largest s over the groups; it asks for s <= 5/3.
        measured: ||f - f#||_n on the training set.
        layerwise: its bound from measured errors of single layers.
        certificate: its bound from moments.
        a_priori: its bound from lambda and norms with c <= 4 and s <= 5/3; None for other reconstructions.
        a_priori_holds: whether the hypotheses of `a_priori` hold.
        bias: Theorem A's empirical error, of the network rounded to `bits` bits.
        variance: Theorem A's complexity sqrt((code length + ln(1/delta)) / (2n)).
        bound: Theorem A's bound in its kl form, at most bias + variance; on the rounded network's true error.
        bits: number of bits per weight, the same on the whole curve: those that give its smallest bound.
        rounded_test_error: test error of that rounded network; None without a test set.
        margin_bias: sqrt(2)/gamma ||f - f#||_n.
        margin_variance: 6 sqrt(P/n (1 + ln(1+4K))).
        margin_bound: Theorem C's bound.
        margin_holds: whether its hypothesis on the norm of the inputs holds.
        train_error: training error of the pruned network, not rounded.
        test_error: its test error; None without a test set.
        refit_train_error: training error of the same nodes after the sequential refit.
        refit_test_error: its test error; None without a test set.
    """

    flops_kept: float
    params: int
    widths: dict[str, int]
    dof: dict[str, float]
    lams: dict[str, float]
    c_max: float
    s_max: float
    measured: float
    layerwise: float
    certificate: float
    a_priori: float | None
    a_priori_holds: bool | None
    bias: float
    variance: float
    bound: float
    bits: int
    rounded_test_error: float | None
    margin_bias: float
    margin_variance: float
    margin_bound: float
    margin_holds: bool
    train_error: float
    test_error: float | None
    refit_train_error: float
    refit_test_error: float | None


@dataclass(frozen=True)
class Tradeoff:
    """The curve, from the smallest network to the largest.

    Args:
        points: one a network.
        samples: size n of the training set.
        delta: the bounds hold each with probability at least 1 - delta.
        output_norm: ||f||_n of the original network.
        base_train_error: training error of the original network.
        base_test_error: its test error; None without a test set.
        settings: the arguments of the call.
    """

    points: tuple[TradeoffPoint, ...]
    samples: int
    delta: float
    output_norm: float
    base_train_error: float
    base_test_error: float | None
    settings: dict[str, Any]

    @property
    def best(self) -> TradeoffPoint:
        """The network with the smallest bound."""
        return min(self.points, key=lambda point: point.bound)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a network."""
        return [asdict(point) for point in self.points]

    def to_json(self) -> str:
        """Return everything as JSON."""
        return to_json(asdict(self))

    def __str__(self) -> str:
        rows = [{**record, "widths": list(record["widths"].values())} for record in self.to_records()]
        base = "" if self.base_test_error is None else f", test error {self.base_test_error:.4f}"
        title = (
            f"trade-off over n = {self.samples} training samples; original network: training error "
            f"{self.base_train_error:.4f}{base}; smallest bound {self.best.bound:.4f} at "
            f"{self.best.flops_kept:.1%} of the FLOPs"
        )
        return format_table(rows, _COLUMNS, title)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw bias, variance, bound and test error of the pruned, rounded networks against their parameters.

        Args:
            ax: where to draw; a new figure if None.  Nothing is shown and no global setting is changed.

        Returns:
            The Axes.
        """
        if ax is None:
            import matplotlib.pyplot as plt  # imported late: pruning without plots should not load it

            _, ax = plt.subplots(figsize=(5.0, 3.4), layout="constrained")
        params = [point.params for point in self.points]
        for label, values, style in (
            ("bound (95 %)" if self.delta == 0.05 else "bound", [p.bound for p in self.points], CURVE_STYLES["bound"]),
            ("bias: training error", [p.bias for p in self.points], CURVE_STYLES["bias"]),
            ("variance: description length", [p.variance for p in self.points], CURVE_STYLES["variance"]),
        ):
            ax.plot(params, values, label=label, **style)
        if self.base_test_error is not None:
            test_errors = np.array([point.rounded_test_error for point in self.points], dtype=float)
            ax.plot(
                params,
                test_errors,
                label="test error",
                **CURVE_STYLES["test"],
            )
        best = self.best
        ax.plot([best.params], [best.bound], label="smallest bound", **CURVE_STYLES["best"])
        ax.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":")
        ax.set_xscale("log")
        ax.set_ylim(0.0, 1.08)
        ax.set_xlabel("parameters of the pruned network")
        ax.set_ylabel("error rate")
        ax.legend(frameon=False, fontsize="small")
        return ax


# Okabe and Ito's colours: distinguishable with any colour vision; line styles carry the difference in grey print.
CURVE_STYLES: dict[str, dict[str, Any]] = {
    "bound": {"color": "#000000", "linestyle": "-", "marker": "o", "markersize": 4},
    "bias": {"color": "#0072B2", "linestyle": "--", "marker": "v", "markersize": 4},
    "variance": {"color": "#D55E00", "linestyle": "-.", "marker": "^", "markersize": 4},
    "test": {"color": "#009E73", "linestyle": "-", "marker": "s", "markersize": 7, "markerfacecolor": "none"},
    "best": {"color": "#CC79A7", "linestyle": "none", "marker": "*", "markersize": 13},
}


def tradeoff(
    model: nn.Module,
    train: Iterable[Any],
    test: Iterable[Any] | None = None,
    *,
    keep: Sequence[float] | None = None,
    lambdas: Sequence[float] | None = None,
    widths: Sequence[Mapping[str, int]] | None = None,
    calibration: Iterable[Any] | None = None,
    selection: str = "greedy",
    theta: float = 0.0,
    reconstruction: str = "channel",
    delta: float = 0.05,
    input_radius: float | None = None,
    forward: Forward | None = None,
    seed: int = 0,
) -> Tradeoff:
    """Prune a trained classifier to many widths; return bounds and measured errors of every pruned network.

    Args:
        model: a chain classifier; left as it is.
        train: the labelled training set that it was trained on, all of it: bounds and ||.||_n are over it.
        test: a labelled test set.
        keep: fractions of the FLOPs to keep; widths are the degrees of freedom at a common relative lambda.  Where none
            of `keep`, `lambdas` and `widths` is given, the fractions of `KEEP_GRID` that the network can meet.
        lambdas: relative lambdas instead; widths are ceil(N_l(lambda Tr Sigma_l)).
        widths: group name to width, one mapping a network, instead.
        calibration: unlabelled data for the least squares of "sequential" and "patch"; the training set if None.  The
            moments that select the nodes, and the theorem's reconstruction, are always over the training set.
        selection: rule that picks the nodes.
        theta: weight of the input loss in the greedy rule.
        reconstruction: of the network that is bounded; "channel" is the theorem's, and the only one with an a-priori
            bound.  The columns `refit_*` are always the sequential refit on the same nodes.
        delta: each bound fails with at most this probability.
        input_radius: bound on ||x|| over all possible inputs; the largest in the training set if None.
        forward: optional `forward(model, batch)`.
        seed: of random choices.

    Returns:
        The curve, from the smallest network to the largest.

    Raises:
        ValueError: more than one grid, an empty grid, or what `prune` and `bound_table` refuse.

    Source:
        Suzuki et al. 2020, arXiv:1808.08558, Theorems 1 and 2, with constants derived here (`specprune.bounds`).
    """
    check_finite_weights(model)
    data = CalibrationData(train, forward)
    held_out = None if test is None else CalibrationData(test, forward)
    used = data if calibration is None else CalibrationData(calibration, forward)
    grid = _grid(keep, lambdas, widths) or _default_grid(model, used)
    logits, targets = collect_logits(model, data)
    measured_radius = input_norm(data, model)
    layers = trace_chain(model, data)
    exact_moments = patch_moments(model, data, [layer.name for layer in layers])
    channel_moments = collect_moments(model, data)
    test_base = None if held_out is None else error_rate(*collect_logits(model, held_out))
    nets: list[tuple[Pruned, Pruned, dict[int, _Rounded]]] = []
    for arguments in tqdm(grid, desc="pruning", disable=None):
        shared = {"selection": selection, "theta": theta, "seed": seed, "moments": channel_moments, **arguments}
        pruned = prune(model, used, reconstruction=reconstruction, **shared)
        refit = prune(model, used, reconstruction="sequential", **shared)
        nets.append((pruned, refit, _rounded_networks(pruned, data, held_out, delta)))
    bits = min((result.bound, bits) for *_, rounded in nets for bits, result in rounded.items())[1]
    points = []
    for pruned, refit, rounded in tqdm(nets, desc="bounding", disable=None):
        points.append(
            _point(
                model,
                pruned,
                refit,
                data,
                held_out,
                exact_moments,
                logits,
                targets,
                rounded[bits],
                delta=delta,
                input_radius=input_radius,
                measured_radius=measured_radius,
            )
        )
        logger.info("kept %.4f of the FLOPs: bound %.4f", points[-1].flops_kept, points[-1].bound)
    return Tradeoff(
        tuple(sorted(points, key=lambda point: point.params)),
        len(targets),
        delta,
        root_mean_square(logits),
        error_rate(logits, targets),
        test_base,
        {
            "selection": selection,
            "theta": theta,
            "reconstruction": reconstruction,
            "input_radius": input_radius,
            "seed": seed,
        },
    )


def _grid(
    keep: Sequence[float] | None, lambdas: Sequence[float] | None, widths: Sequence[Mapping[str, int]] | None
) -> list[dict[str, Any]]:
    if sum(choice is not None for choice in (keep, lambdas, widths)) > 1:
        raise ValueError("give one of keep, lambdas and widths, not several")
    if keep is None and lambdas is None and widths is None:
        return []
    if lambdas is not None:
        grid = [{"allocation": "dof", "lam": float(lam)} for lam in lambdas]
    elif widths is not None:
        grid = [{"widths": dict(entry)} for entry in widths]
    else:
        grid = [{"allocation": "dof", "keep": float(value)} for value in keep or ()]
    if not grid:
        raise ValueError("the grid is empty: give at least one fraction, lambda or mapping of widths")
    return grid


def _default_grid(model: nn.Module, data: CalibrationData) -> list[dict[str, Any]]:
    least = smallest_fraction(model, data)
    return [{"allocation": "dof", "keep": keep} for keep in KEEP_GRID if keep > least]


@dataclass(frozen=True)
class _Rounded:
    """What is kept of a network rounded to some number of bits; the network itself is not."""

    bits: int
    bound: float
    complexity: float
    train_error: float
    test_error: float | None


def _rounded_networks(
    pruned: Pruned, data: CalibrationData, held_out: CalibrationData | None, delta: float
) -> dict[int, _Rounded]:
    results = occam_results(pruned.model, data, [group.width for group in pruned.groups], delta=delta)
    return {
        bits: _Rounded(
            bits,
            result.bound.value,
            result.complexity,
            result.train_error,
            None if held_out is None else error_rate(*collect_logits(result.network.model, held_out)),
        )
        for bits, result in results.items()
    }


def _point(
    model: nn.Module,
    pruned: Pruned,
    refit: Pruned,
    data: CalibrationData,
    held_out: CalibrationData | None,
    moments: Moments,
    logits: np.ndarray,
    targets: np.ndarray,
    rounded: _Rounded,
    *,
    delta: float,
    input_radius: float | None,
    measured_radius: float,
) -> TradeoffPoint:
    report = pruned.report
    distance = approximation(model, pruned, data, moments=moments)
    original_widths = [group.width for group in pruned.groups]
    _, dudley = covering_bounds(
        trace_chain(pruned.model, data),
        logits,
        targets,
        distance.measured,
        input_radius=input_radius,
        measured_radius=measured_radius,
        original_widths=original_widths,
        delta=delta,
    )

    def errors(net: nn.Module) -> tuple[float, float | None]:
        train_error = error_rate(*collect_logits(net, data))
        return train_error, None if held_out is None else error_rate(*collect_logits(net, held_out))

    train_error, test_error = errors(pruned.model)
    refit_train_error, refit_test_error = errors(refit.model)
    a_priori = distance.a_priori
    return TradeoffPoint(
        flops_kept=report.flops_after / report.flops_before,
        params=report.params_after,
        widths={entry.group: entry.width_after for entry in report.groups},
        dof={entry.group: entry.dof for entry in report.groups},
        lams={entry.group: entry.lam for entry in report.groups},
        c_max=max(entry.c for entry in report.groups),
        s_max=max(entry.s for entry in report.groups),
        measured=distance.measured,
        layerwise=distance.layerwise.value,
        certificate=distance.certificate.value,
        a_priori=None if a_priori is None else a_priori.value,
        a_priori_holds=None if a_priori is None else a_priori.valid,
        bias=rounded.train_error,
        variance=rounded.complexity,
        bound=rounded.bound,
        bits=rounded.bits,
        rounded_test_error=rounded.test_error,
        margin_bias=dudley.terms["bias"],
        margin_variance=dudley.terms["variance"],
        margin_bound=dudley.value,
        margin_holds=dudley.valid,
        train_error=train_error,
        test_error=test_error,
        refit_train_error=refit_train_error,
        refit_test_error=refit_test_error,
    )
