"""Every measure that may predict how well a network generalizes, in one registry."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from specprune._records import format_table, to_json
from specprune.analysis.measure_table import MeasureTable
from specprune.analysis.measured_network import Measure, MeasuredNetwork
from specprune.analysis.norm_measures import NORM_MEASURES
from specprune.analysis.spectral_measures import SPECTRAL_MEASURES
from specprune.analysis.stability_measures import STABILITY_MEASURES

logger = logging.getLogger(__name__)

#: Name to measure, from norms to spectra to noise and pruning.
MEASURES: dict[str, Measure] = {
    measure.name: measure for measure in (*NORM_MEASURES, *SPECTRAL_MEASURES, *STABILITY_MEASURES)
}


def find_measures(names: Iterable[str] | None = None) -> list[Measure]:
    """Return measures by name.

    Args:
        names: keys of `MEASURES`; None for all.

    Raises:
        ValueError: an unknown name, or none at all.
    """
    chosen = list(MEASURES) if names is None else list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in MEASURES]
    if unknown or not chosen:
        raise ValueError(f"measures {unknown or chosen}: expected some of {', '.join(MEASURES)}")
    return [MEASURES[name] for name in chosen]


def registry_records() -> list[dict[str, Any]]:
    """Return one record a measure: name, direction, cost, what it needs, meaning, formula and source."""
    fields = ("name", "higher_is_worse", "cost", "needs", "meaning", "formula", "source")
    return [{field: getattr(measure, field) for field in fields} for measure in MEASURES.values()]


def registry_table() -> str:
    """Return the registry as a text table."""
    columns = ["name", "higher_is_worse", "cost", "needs", "meaning"]
    return format_table(registry_records(), columns, "measures of generalization")


@dataclass(frozen=True)
class NetworkMeasures:
    """The measures of one network.

    Attributes:
        values: name to value.
        refused: name to reason, for the measures that are not defined for this network.
    """

    values: Mapping[str, float]
    refused: Mapping[str, str]

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record a measure: value, or why there is none; direction, cost, meaning, formula, source."""
        records = []
        for name in (*self.values, *self.refused):
            measure = MEASURES[name]
            records.append(
                {
                    "measure": name,
                    "value": self.values.get(name),
                    "higher_is_worse": measure.higher_is_worse,
                    "cost": measure.cost,
                    "meaning": measure.meaning,
                    "formula": measure.formula,
                    "source": measure.source,
                    "refused": self.refused.get(name),
                }
            )
        return records

    def to_json(self) -> str:
        """Return the records as JSON."""
        return to_json(self.to_records())

    def __str__(self) -> str:
        rows = [record for record in self.to_records() if record["value"] is not None]
        lines = [
            format_table(rows, ["measure", "value", "higher_is_worse", "cost", "meaning"], "measures of a network")
        ]
        return "\n".join([*lines, *(f"{name}: {reason}" for name, reason in self.refused.items())])


def network_measures(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    names: Sequence[str] | None = None,
    *,
    start: nn.Module | None = None,
    population: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> NetworkMeasures:
    """Return what the measures of the registry say of one trained classifier.

    Args:
        model: the classifier; left as it is.
        inputs: all its training inputs, (m, ...), on the model's device.
        targets: int64 labels that it was trained on, (m,).
        names: keys of `MEASURES`; None for all.
        start: the network before training, for distances.
        population: inputs and labels that stand for the law of the data, for measures of the data.
        seed: of random choices.

    Returns:
        Values; what is not defined for this network (no start, no hidden layer, no chain, ...) is listed with its
        reason.

    Raises:
        ValueError: an unknown name; a network or data that no measure can read.
        TypeError: labels missing.
    """
    chosen = find_measures(names)
    net = MeasuredNetwork(model, inputs, targets, start, population, seed)
    _ = net.layers, net.logits  # what fails here fails for all, and is no property of a measure
    values, refused = {}, {}
    for measure in chosen:
        if measure.needs and getattr(net, measure.needs) is None:
            refused[measure.name] = f"{measure.needs} was not given"
            continue
        try:
            values[measure.name] = measure(net)
        except ValueError as reason:
            refused[measure.name] = str(reason)
            logger.info("measure %s: %s", measure.name, reason)
    return NetworkMeasures(values, refused)


def measure_table(
    settings: Sequence[Mapping[str, Any]],
    values: Sequence[Mapping[str, float]],
    gaps: Sequence[float],
    *,
    n_test: int | None = None,
) -> MeasureTable:
    """Return the table of many networks that rankings are made from: measures with the sign that predicts the gap.

    Args:
        settings: one mapping a network, hyperparameter to number or text; those that never change are left out.
        values: one mapping a network, measure to value; the same measures for all.
        gaps: test error minus training error.
        n_test: size of the test set, for the noise of the gaps.

    Raises:
        ValueError: mappings with different keys, lists of different lengths, no hyperparameter that changes, unknown
            measures, or what `MeasureTable` refuses.
    """
    if not len(settings) == len(values) == len(gaps) or not len(gaps):
        raise ValueError(f"{len(settings)} settings, {len(values)} values and {len(gaps)} gaps: expected one a network")
    for label, rows in (("settings", settings), ("values", values)):
        odd = next((index for index, row in enumerate(rows) if list(row) != list(rows[0])), None)
        if odd is not None:
            raise ValueError(f"{label} of network {odd} are {list(rows[odd])}, of the first {list(rows[0])}")
    columns = {name: np.array([row[name] for row in settings]) for name in settings[0]}
    changing = {name: column for name, column in columns.items() if len(np.unique(column)) > 1}
    signs = {measure.name: 1.0 if measure.higher_is_worse else -1.0 for measure in find_measures(values[0])}
    oriented = {name: sign * np.array([row[name] for row in values], float) for name, sign in signs.items()}
    return MeasureTable(changing, oriented, np.array(gaps, float), n_test)
