"""Double descent of pruned least squares: risk against size, in theory and by simulation.

The risk of least squares falls with its size, rises to a peak where it has as many features as examples, and falls
again.  So does the risk of what is left after pruning it to a fixed number of features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm import tqdm

from specprune._records import format_table, to_json
from specprune.analysis.linear_simulation import SimulatedRisks, simulate_risks
from specprune.bounds.bound import check_count
from specprune.bounds.overparameterized import IntArray, LinearProblem, check_sizes
from specprune.bounds.pruned_risks import METHODS, PrunedRisks, pruned_risks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe and Ito's colours; line styles carry the difference in grey print.
METHOD_STYLES: dict[str, dict[str, Any]] = {
    "unpruned": {"color": "#000000", "linestyle": "-"},
    "magnitude": {"color": "#0072B2", "linestyle": "--"},
    "hessian": {"color": "#D55E00", "linestyle": "-."},
    "oracle": {"color": "#009E73", "linestyle": ":"},
    "magnitude_refit": {"color": "#56B4E9", "linestyle": (0, (7, 1.5))},
    "hessian_refit": {"color": "#E69F00", "linestyle": (0, (7, 1.5, 1, 1.5, 1, 1.5))},
    "magnitude_fresh": {"color": "#999999", "linestyle": (0, (2, 2))},
    "hessian_fresh": {"color": "#999999", "linestyle": (0, (3, 1.5, 1, 1.5, 1, 1.5))},
    "oracle_refit": {"color": "#CC79A7", "linestyle": (0, (1, 3))},
}
#: Of what was simulated or measured, so that dots differ in grey print, too.
METHOD_MARKERS = {
    "unpruned": "o",
    "magnitude": "v",
    "hessian": "^",
    "oracle": "s",
    "magnitude_refit": "D",
    "hessian_refit": "P",
    "magnitude_fresh": "<",
    "hessian_fresh": ">",
    "oracle_refit": "X",
}
METHOD_LABELS = {
    "unpruned": "not pruned",
    "magnitude": "magnitude",
    "hessian": "Hessian",
    "oracle": "right features",
    "magnitude_refit": "magnitude, refit",
    "hessian_refit": "Hessian, refit",
    "magnitude_fresh": "magnitude, new data",
    "hessian_fresh": "Hessian, new data",
    "oracle_refit": "trained small",
}
_CEILING = 2.5  # of the null risk: the peak itself has none


@dataclass(frozen=True)
class DoubleDescent:
    """Risk against size.

    Attributes:
        n: training examples, where the peak is.
        keep: s, features that are left after pruning.
        features: P.
        null_risk: of the prediction 0.
        theory: risks of all methods, one row a size.
        simulated: some of the sizes again, by simulation.
    """

    n: int
    keep: int
    features: int
    null_risk: float
    theory: PrunedRisks
    simulated: tuple[SimulatedRisks, ...] = ()

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a size, with the simulated means and their standard errors where there are any."""
        simulated = {each.size: each.to_record() for each in self.simulated}
        records = []
        for record in self.theory.to_records():
            extra = simulated.get(record["size"], {})
            records.append(record | {f"simulated_{k}": v for k, v in extra.items() if k not in ("size", "keep")})
        return records

    def to_json(self) -> str:
        """Return everything as JSON."""
        numbers = {name: getattr(self, name) for name in ("n", "keep", "features", "null_risk")}
        return to_json(numbers | {"sizes": self.to_records()})

    def __str__(self) -> str:
        rows = [{key: record[key] for key in ("size", *METHODS)} for record in self.theory.to_records()]
        return format_table(rows, title=f"test risk, n = {self.n}, kept to {self.keep} of {self.features} features")

    def plot(self, ax: Axes | None = None, methods: Sequence[str] = METHODS) -> Axes:
        """Draw risk against size, theory as lines and simulations as dots with two standard errors.

        Args:
            ax: where to draw; new axes if None.
            methods: which of `METHODS`.

        Returns:
            The axes.

        Raises:
            ValueError: an unknown method.
        """
        unknown = [name for name in methods if name not in METHODS]
        if unknown:
            raise ValueError(f"methods {unknown}: expected some of {', '.join(METHODS)}")
        if ax is None:
            import matplotlib.pyplot as plt  # draws; the numbers do without

            _, ax = plt.subplots()
        draw_risks(ax, self.n, self.to_records(), methods, _CEILING * self.null_risk)
        return ax


def draw_risks(ax: Axes, n: int, records: Sequence[Mapping[str, Any]], methods: Sequence[str], ceiling: float) -> None:
    """Draw risks against size: theory as lines, simulations as dots with two standard errors.

    Args:
        ax: where to draw.
        n: number of examples, where the peak is; no line is drawn across it.
        records: as of `DoubleDescent.to_records`; what they lack is not drawn.
        methods: which of `METHODS`.
        ceiling: largest risk that is drawn: the peak has none.
    """
    records = sorted(records, key=lambda record: float(record["size"]))
    for name in methods:
        style = METHOD_STYLES[name]
        label: str | None = METHOD_LABELS[name]
        dots = [r for r in records if {f"simulated_{name}", f"simulated_{name}_error"} <= r.keys()]
        dotted = {"color": style["color"], "marker": METHOD_MARKERS[name], "markersize": 3}
        if dots and any(r.get(name) is not None for r in records):  # one entry of the legend for both
            ax.plot([], [], label=label, **{**style, **dotted})
            label = None
        for side in (-1, 1):
            line = [(r["size"], r[name]) for r in records if side * (r["size"] - n) > 0 and r.get(name) is not None]
            if line:
                ax.plot(*zip(*line, strict=True), label=label, **style)
                label = None
        if dots:
            means = [r[f"simulated_{name}"] for r in dots]
            errors = [2 * r[f"simulated_{name}_error"] for r in dots]
            dotted |= {"linestyle": "none", "elinewidth": 0.8}
            ax.errorbar([r["size"] for r in dots], means, errors, label=label and f"{label} (simulated)", **dotted)
    ax.axvline(n, color="0.6", linewidth=0.8, linestyle=":")
    size_axis(ax)
    ax.set_ylim(0, ceiling or None)
    ax.set_xlabel("features trained on")
    ax.set_ylabel("test risk (squared error)")
    ax.legend(frameon=False, fontsize="small")


def size_axis(ax: Axes) -> None:
    """Make x logarithmic, with plain numbers at 1, 2 and 5 times powers of ten.

    Args:
        ax: with its curves.
    """
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter  # draws; the numbers do without

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def usual_sizes(problem: LinearProblem, keep: int, count: int = 60) -> IntArray:
    """Return sizes from `keep` to all features, evenly spaced on a logarithmic scale, denser around n, without n.

    Args:
        problem: with n examples and P features.
        keep: s, the smallest size.
        count: about how many.

    Raises:
        ValueError: keep above P.
    """
    keep = check_count("keep", keep)
    if keep > problem.features:
        raise ValueError(f"keep = {keep} of {problem.features} features; expected at most as many")
    even = np.geomspace(keep, problem.features, count)
    near = problem.n * (1 + np.array([-0.2, -0.1, -0.05, -0.02, 0.02, 0.05, 0.1, 0.2]))
    sizes = np.unique(np.concatenate([even, near]).round().astype(np.int64))
    return sizes[(sizes >= keep) & (sizes <= problem.features) & (sizes != problem.n)]


def double_descent(
    problem: LinearProblem,
    keep: int,
    sizes: ArrayLike | None = None,
    *,
    simulated: Sequence[int] = (),
    draws: int = 100,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> DoubleDescent:
    """Return the risk of least squares and of what pruning leaves of it, against the number of features.

    Args:
        problem: what is learnt.
        keep: s, how many features are left after pruning.
        sizes: k, numbers of features that are trained on, not n; `usual_sizes` if None.
        simulated: sizes to simulate as well.
        draws: training sets for each simulated size.
        seed: of the simulation.
        device: where to simulate.

    Returns:
        Theory, and simulation where asked for.

    Raises:
        ValueError: sizes or keep out of range, or equal to n.

    Source: Chang et al. 2021 (arXiv:2012.08749); see `specprune.bounds.pruned_risks`.
    """
    keep = check_count("keep", keep)
    chosen = usual_sizes(problem, keep) if sizes is None else check_sizes(sizes, problem.features, problem.n)
    if len(simulated):
        chosen = np.union1d(chosen, check_sizes(simulated, problem.features, problem.n, "simulated"))
    theory = pruned_risks(problem, chosen, keep)
    found = tuple(
        simulate_risks(problem, keep, size=int(size), draws=draws, seed=seed + number, device=device)
        for number, size in enumerate(tqdm(simulated, disable=None, desc="simulating", leave=False))
    )
    return DoubleDescent(problem.n, keep, problem.features, problem.null_risk, theory, found)
