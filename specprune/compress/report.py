"""What pruning gives back: the smaller network, and a report of what was done to each group of nodes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from specprune._records import format_table, to_json
from specprune.bounds.nodes import WeightedNodes
from specprune.compress.latency import Latency
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
    "flops_before",
    "flops_after",
    "params_before",
    "params_after",
    "seconds",
)


@dataclass(frozen=True)
class PruneReport:
    """What pruning did to the network.

    Args:
        groups: one entry a group; the network's last layer has no group of its own.
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
        """Return one record a group."""
        return [asdict(group) for group in self.groups]

    def to_json(self) -> str:
        """Return the whole report as JSON."""
        return to_json(asdict(self))

    def __str__(self) -> str:
        head = (
            f"FLOPs {self.flops_before} -> {self.flops_after} ({self.flops_after / self.flops_before:.1%}), "
            f"parameters {self.params_before} -> {self.params_after} ({self.params_after / self.params_before:.1%}), "
            f"{self.samples} calibration samples, {self.seconds:.1f} s"
        )
        lines = [format_table(self.to_records(), _COLUMNS, head)]
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
        model: an ordinary, smaller module of the same classes, on the same device, in the same mode.
        report: what was done.
        groups: the groups that were pruned.
        nodes: group name to the kept nodes, with the weights omega of the theory; indices ascend.
    """

    model: nn.Module
    report: PruneReport
    groups: tuple[Group, ...]
    nodes: dict[str, WeightedNodes]
