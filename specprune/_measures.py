"""A network measured, or all networks of a zoo: what `specprune measures` runs, and goes on with after a stop."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from specprune._files import append_line, lock_folder, read_lines
from specprune._problem import Problem
from specprune._records import from_json, shortened, to_json
from specprune.analysis.measure_ranking import MeasureRanking, rank_measures
from specprune.analysis.measure_table import MeasureTable
from specprune.analysis.measures import NetworkMeasures, find_measures, measure_table, network_measures
from specprune.compress.batches import batch_inputs, batch_targets
from specprune.testbed import Dataset, load_dataset
from specprune.testbed.zoo import zoo_training_set
from specprune.testbed.zoo_store import ZooNetwork, load_zoo

logger = logging.getLogger(__name__)

_RARE = 0.02  # a measure that more networks than this share lack is left out; below, those networks are
_SETTINGS_LEFT_OUT = ("data", "seed")  # one data set a zoo; networks that differ in the seed are repeats


@dataclass(frozen=True)
class MeasuredZoo:
    """The measures of all networks of a zoo that reached the training loss, and how well they predict the gap.

    Attributes:
        table: measures with the sign that predicts a larger gap.
        ranking: of the measures, all pairs of networks counting alike: what the test set's noise decides is in it.
        certain: the same with pairs weighed by how sure the order of their gaps is; None where the test set is too
            small for any environment to be sure of.
        left_out: networks that did not converge.
        odd: networks that are left out because a measure is not defined for them, but for nearly all others.
        dropped: measure to reason, for those that are not defined for more networks than that.
    """

    table: MeasureTable
    ranking: MeasureRanking
    certain: MeasureRanking | None
    left_out: int
    odd: int
    dropped: dict[str, str]

    def to_json(self) -> str:
        """Return ranking, table and what was left out as JSON."""
        columns = {**self.table.hyperparameters, **self.table.measures, "gap": self.table.gap}
        return to_json(
            {
                "ranking": json.loads(self.ranking.to_json()),
                "certain": None if self.certain is None else json.loads(self.certain.to_json()),
                "left_out": self.left_out,
                "odd": self.odd,
                "dropped": self.dropped,
                "n_test": self.table.n_test,
                "hyperparameters": list(self.table.hyperparameters),
                "networks": columns,
            }
        )

    def __str__(self) -> str:
        lines = [f"all pairs alike: {self.ranking}"]
        if self.certain is None:
            lines.append(f"{self.table.n_test} test examples are too few to be sure of the order of any two settings")
        else:
            lines.append(f"pairs by how sure their order is: {self.certain}")
        if self.left_out:
            lines.append(f"{self.left_out} networks did not reach the training loss and are left out")
        if self.odd:
            lines.append(f"{self.odd} networks are left out because some measure is not defined for them")
        return "\n".join([*lines, *(f"{name}: left out, {reason}" for name, reason in self.dropped.items())])


def measured_zoo(
    folder: str | os.PathLike[str],
    data: str | None,
    data_dir: str | os.PathLike[str] | None,
    records: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    jobs: int = 1,
    resamples: int = 400,
    seed: int = 0,
) -> MeasuredZoo:
    """Measure the networks of a zoo and rank the measures.

    Args:
        folder: of the zoo.
        data: name of the data set; None for that of the first network.
        data_dir: where to look for it first.
        records: file of what was measured, a line a network; networks that are in it are not measured again.
        names: measures; None for all.
        jobs: processes.
        resamples: of the ranking's intervals.
        seed: of random choices.

    Raises:
        ValueError: unknown measures, a zoo of other data, too few networks that converged, or another run
            at work in the folder of the records.
    """
    chosen = [measure.name for measure in find_measures(names)]
    zoo = load_zoo(folder)
    networks = [network for network in zoo.networks if network.converged]
    if len(networks) < 2:
        raise ValueError(f"{folder}: {len(networks)} of {len(zoo.networks)} networks converged; a ranking needs two")
    dataset = load_dataset(data or networks[0].setting.data, data_dir)
    with lock_folder(Path(records).parent):
        found = measured_networks(networks, dataset, records, chosen, jobs=jobs, seed=seed)
    refusing = {name: sum(name in record["refused"] for record in found) for name in chosen}
    rare = {name for name, count in refusing.items() if 0 < count <= _RARE * len(found)}
    odd = [index for index, record in enumerate(found) if rare & set(record["refused"])]
    networks = [network for index, network in enumerate(networks) if index not in odd]
    found = [record for index, record in enumerate(found) if index not in odd]
    dropped = {name: reason for record in found for name, reason in record["refused"].items() if name in chosen}
    kept = [name for name in chosen if name not in dropped]
    if not kept:
        raise ValueError(f"no measure is defined for all networks: {dropped}")
    settings = [
        {key: value for key, value in asdict(network.setting).items() if key not in _SETTINGS_LEFT_OUT}
        for network in networks
    ]
    values = [{name: record["values"][name] for name in kept} for record in found]
    gaps = [law_gap(network, dataset.classes) for network in networks]
    table = measure_table(settings, values, gaps, n_test=len(dataset.test_inputs))
    # Few seeds a setting: environments take all settings of the other hyperparameters together.
    ranking = rank_measures(replace(table, n_test=None), pooled=True, resamples=resamples, seed=seed)
    try:
        certain = rank_measures(table, pooled=True, resamples=resamples, seed=seed)
    except ValueError as reason:  # no environment with enough pairs that the test set can tell apart
        logger.info("no ranking by certain pairs: %s", reason)
        certain = None
    unfinished = sum(not network.converged for network in zoo.networks)
    return MeasuredZoo(table, ranking, certain, unfinished, len(odd), dropped)


def measured_problem(problem: Problem, names: Sequence[str] | None = None, seed: int = 0) -> NetworkMeasures:
    """Return the measures of one network on its whole training set.

    Args:
        problem: network and data.
        names: measures; None for all.
        seed: of random choices.
    """
    inputs, targets = _joined(problem.train)
    population = None if problem.test is None else _joined(problem.test)
    return network_measures(
        problem.model, inputs, targets, names, start=problem.initial, population=population, seed=seed
    )


def _joined(batches: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs and the labels of all batches."""
    pairs = [(batch_inputs(batch), batch_targets(batch)) for batch in batches]
    return torch.cat([inputs for inputs, _ in pairs]), torch.cat([targets for _, targets in pairs])


def law_gap(network: ZooNetwork, classes: int) -> float:
    """Return error on the law that the training set was drawn from, minus training error.

    Where a share r of the training labels was drawn anew, uniformly, the law has such labels too: a network that is
    wrong on a share e of clean labels is wrong on (1 - r) e + r (1 - 1/K) of them.

    Args:
        network: of a zoo.
        classes: K.
    """
    noise = network.setting.label_noise
    return (1 - noise) * network.test_error + noise * (1 - 1 / classes) - network.train_error


def measured_networks(
    networks: Sequence[ZooNetwork],
    dataset: Dataset,
    records: str | os.PathLike[str],
    names: Sequence[str],
    *,
    jobs: int = 1,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return "values" and "refused" of every network, measuring those that the file of records does not have.

    Args:
        networks: of a zoo.
        dataset: what they were trained on.
        records: file of records, see `measured_zoo`.
        names: measures.
        jobs: processes.
        seed: of random choices.
    """
    path = Path(records)
    done = measured_records(path)
    tasks = []
    for network in networks:
        record = done.get(network.setting.digest, {"values": {}, "refused": {}})
        missing = [name for name in names if name not in record["values"] and name not in record["refused"]]
        if missing:
            tasks.append((network, missing))
    logger.info("%d of %d networks are measured already", len(networks) - len(tasks), len(networks))
    results = Parallel(n_jobs=jobs, return_as="generator_unordered")(
        delayed(_measured)(network, dataset, missing, seed) for network, missing in tasks
    )
    for record in tqdm(results, total=len(tasks), desc="measuring networks", disable=None, leave=False):
        append_line(path, json.dumps(record))
        old = done.get(record["digest"], {"values": {}, "refused": {}})
        done[record["digest"]] = {key: old[key] | record[key] for key in ("values", "refused")}
    return [done[network.setting.digest] for network in networks]


def measured_records(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Return what a file of records has: digest of a network's setting to "values" and "refused", by measure.

    Args:
        path: of the file; none is as good as an empty one.

    Raises:
        ValueError: a line is not what `measured_networks` writes.
    """
    done: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        try:
            record = from_json(line)
            digest, values, refused = record["digest"], record["values"], record["refused"]
            if type(digest) is not str or not all(type(value) in (int, float) for value in values.values()):
                raise ValueError("a digest that is no text, or a value that is no number")
            if not all(type(reason) is str for reason in refused.values()):
                raise ValueError("a reason that is no text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = shortened(str(error))
            raise ValueError(f"{path}: line {number} is no record of measures ({reason}); remove it") from error
        old = done.get(digest, {"values": {}, "refused": {}})
        done[digest] = {"values": old["values"] | values, "refused": old["refused"] | refused}
    return done


def _measured(network: ZooNetwork, dataset: Dataset, names: Sequence[str], seed: int) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        own = zoo_training_set(dataset, network.setting)
        found = network_measures(
            network.model(),
            own.train_inputs,
            own.train_targets,
            names,
            start=network.initial(),
            population=(own.test_inputs, own.test_targets),
            seed=seed,
        )
    finally:
        torch.set_num_threads(threads)
    return {"digest": network.setting.digest, "values": dict(found.values), "refused": dict(found.refused)}
