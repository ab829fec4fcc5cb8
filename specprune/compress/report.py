"""What pruning gives back: the smaller network, and a report of what was done to each group of nodes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from specprune._records import format_table, to_json, to_latex_table
from specprune.bounds.nodes import WeightedNodes
from specprune.compress.fitted_network import FittedLayer
from specprune.compress.latency import Latency
from specprune.compress.low_rank_network import LowRankLayer
from specprune.compress.sampling import SampledGroup
from specprune.compress.sparsify import SparseLayer
from specprune.compress.surgery import Group, Skipped


@dataclass(frozen=True)
class GroupReport:
    """What happened to one group of nodes.

    Args:
        group: the layer that makes the units; the first, if there are several.
        consumer: the layers that read them.
        width_before: number of nodes m.
        width_after: number of nodes kept.
        lam: lambda, in units of the covariance.
        dof: degrees of freedom N(lambda).
        leverage_kept: sum of the leverage scores of the kept nodes, in [0, 1].
        c: lambda_max(Res) / lambda of the kept set; the theorem asks for c <= 4.
        s: sum of omega / m; the theorem asks for s <= 5/3.
        input_loss: L_A(J) / Tr Sigma.
        output_loss: L_B(J) / Tr Z Sigma Z^T.
        output_bound: ceiling on it, c lambda ||Z||_F^2 / Tr Z Sigma Z^T; the theorem has 4 in place of c.
        condition: condition number of what the reconstruction solved for the group's readers, the largest of them: of
            the second moment of all that a reader still reads, ridge included (about its mean where it has a constant),
            or, with "channel", of S_JJ + I_tau.  An estimate in the 1-norm (LAPACK dpocon); without any ridge, the
            ratio of the largest to the smallest eigenvalue that counts.  None where nothing was solved (nothing cut
            before the readers, "none"), and for the refits of recurrent layers.
        flops_before: FLOPs of the group's own layer for one sample, before.
        flops_after: the same, after.
        params_before: parameters of the group's own layer and its batch norms, before.
        params_after: the same, after.
        seconds: time spent on selection and reconstruction.
    """

    group: str
    consumer: str
    width_before: int
    width_after: int
    lam: float
    dof: float
    leverage_kept: float
    c: float
    s: float
    input_loss: float
    output_loss: float
    output_bound: float
    condition: float | None
    flops_before: int
    flops_after: int
    params_before: int
    params_after: int
    seconds: float


_COLUMNS = (
    "group",
    "consumer",
    "width_before",
    "width_after",
    "lam",
    "dof",
    "leverage_kept",
    "c",
    "s",
    "input_loss",
    "output_loss",
    "output_bound",
    "condition",
    "flops_before",
    "flops_after",
    "params_before",
    "params_after",
    "seconds",
)


_LATEX_COLUMNS = {
    "group": "group",
    "width_before": "nodes",
    "width_after": "kept",
    "lam": "lambda",
    "dof": "N(lambda)",
    "c": "c",
    "s": "s",
    "input_loss": "input loss",
    "output_loss": "output loss",
    "output_bound": "its ceiling",
    "condition": "condition",
}


@dataclass(frozen=True)
class LocalError:
    """What a method promises of one layer or group, and what came out, as fractions; see the entry of the report.

    Args:
        place: name of the layer or group.
        promised: ceiling on the error.
        measured: the error.
    """

    place: str
    promised: float
    measured: float


LayerReport = LowRankLayer | FittedLayer | SampledGroup | SparseLayer


def _local_error(entry: GroupReport | LayerReport) -> LocalError | None:
    """Return the promise of an entry; a fitted layer has none."""
    match entry:
        case GroupReport():
            return LocalError(entry.group, entry.output_bound, entry.output_loss)
        case LowRankLayer():
            return LocalError(entry.layer, entry.error_theorem, entry.error_exact)
        case SampledGroup():
            return LocalError(entry.group, entry.epsilon_promised, entry.epsilon_measured)
        case SparseLayer():
            return LocalError(entry.layer, entry.epsilon_promised, entry.epsilon_measured)
    return None


@dataclass(frozen=True)
class PruneReport:
    """What a method did to the network.

    Args:
        groups: one entry a group that lost nodes by spectral pruning or "hybrid"; the network's last layer has none.
        layers: one entry a layer that became low-rank or sparse, or a group that was sampled.
        skipped: what was left whole, and why.
        settings: the arguments of the call.
        flops_before: FLOPs of one sample (two a multiply-add), before.
        flops_after: the same, after.
        params_before: number of parameters, before.
        params_after: the same, after.
        latencies: measured times of both networks, if they were asked for.
        samples: number of calibration samples.
        seconds: time of the whole call.
    """

    groups: tuple[GroupReport, ...]
    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    settings: dict[str, Any]
    flops_before: int
    flops_after: int
    params_before: int
    params_after: int
    latencies: tuple[Latency, ...]
    samples: int
    seconds: float

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a group, then one a layer."""
        return [asdict(entry) for entry in (*self.groups, *self.layers)]

    def local_errors(self) -> tuple[LocalError, ...]:
        """Return what the method promises of every group and layer, and what came out on the calibration data.

        For groups both numbers are of the theory's reconstruction, the channel mix; other refits lose less, as a rule.
        Fitted layers, and cuts without any reconstruction, have no promise.
        """
        if self.settings["reconstruction"] == "none":
            return ()
        found = (_local_error(entry) for entry in (*self.groups, *self.layers))
        return tuple(entry for entry in found if entry is not None)

    def to_json(self) -> str:
        """Return the whole report as JSON."""
        return to_json(asdict(self))

    def to_latex(self) -> str:
        """Return what was done to the groups, then to the layers, as LaTeX tabulars, which need booktabs.

        Layers of several kinds have a tabular each.
        """
        tables = [to_latex_table([asdict(group) for group in self.groups], _LATEX_COLUMNS)] if self.groups else []
        for kind in dict.fromkeys(type(layer) for layer in self.layers):
            records = [asdict(layer) for layer in self.layers if type(layer) is kind]
            tables.append(to_latex_table(records, {name: name.replace("_", " ") for name in records[0]}))
        return "\n\\par\\medskip\n".join(tables)

    def __str__(self) -> str:
        head = (
            f"FLOPs {self.flops_before} -> {self.flops_after} ({self.flops_after / self.flops_before:.1%}), "
            f"parameters {self.params_before} -> {self.params_after} ({self.params_after / self.params_before:.1%}), "
            f"{self.samples} calibration samples, {self.seconds:.1f} s"
        )
        lines = [head]
        if self.groups:
            lines.append(format_table([asdict(group) for group in self.groups], _COLUMNS))
        if self.layers:
            lines.append(format_table([asdict(layer) for layer in self.layers]))
        lines += [
            f"latency, batch of {entry.batch}: {entry.before_ms:.3g} -> {entry.after_ms:.3g} ms "
            f"({entry.speed_up:.2f} times faster; FLOPs fell {self.flops_before / self.flops_after:.2f} times)"
            for entry in self.latencies
        ]
        lines += [f"left whole: {entry.name}: {entry.reason}" for entry in self.skipped]
        return "\n".join(lines)


@dataclass(frozen=True)
class Pruned:
    """A pruned network and how it came about.

    Args:
        model: an ordinary, smaller module, on the same device, in the same mode; of the same classes, but for low-rank
            layers, each of which is an `nn.Sequential` of two.
        report: what was done.
        groups: the groups that lost nodes.
        nodes: group name to the kept nodes, with the weights omega of the theory; indices ascend.
    """

    model: nn.Module
    report: PruneReport
    groups: tuple[Group, ...]
    nodes: dict[str, WeightedNodes]
