"""How hard a data set is to learn from its examples, and how smooth a network is: cover complexity and smoothness.

Written in distances, with nn(x, S) the distance of x to the nearest point of S, T_i the training points and mu_i the
law of class i of K, all inputs in [0, 1]^d:

    total  = E_mu nn(x, T),   self = mean_i E_mu_i nn(x, T_i),   mutual = mean_{i != j} E_mu_j nn(x, T_i),
    cover complexity = total / (mutual - self).

The paper has these as covers, rho = int_0^1 h(sqrt(d) r) dr with h(r) the probability of the balls of radius r around
the training points.  Derived: rho = 1 - E nn / sqrt(d) (Fubini; no distance in the box exceeds sqrt(d)), so
(1 - total cover) / (self cover - mutual cover) is the ratio above, and the unit of length cancels.

Source: Jin, Lu, Tang and Karniadakis 2019 (arXiv:1905.11427).  Its abstract, which was read, has the name, the inverse
modulus of continuity, and the claim that the error divided by sqrt(K) is linear in the cover complexity.  The
definitions are as recalled in the project's theory notes, C.2; what is marked derived is derived there or here.  What
was measured is in docs/measures.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from specprune._records import format_table, to_json
from specprune.bounds.bound import check_number

_BLOCK = 1024  # points compared with as many others at a time
_BISECTIONS = 30


@dataclass(frozen=True, eq=False)
class CoverComplexity:
    """How well the training points of each class cover the test points of each class.

    Attributes:
        classes: the labels, rising, shape (K,).
        train: number of training points.
        test: number of test points, which stand for the law mu.
        dimension: d, numbers in an input.
        unit_box: whether all inputs lie in [0, 1]^d, which the paper's covers ask for.
        distances: [i, j] is the mean distance from class j's test points to class i's training points, shape (K, K).
        nearest: distance of each test point to the training set, shape (test,).
    """

    classes: Tensor
    train: int
    test: int
    dimension: int
    unit_box: bool
    distances: Tensor
    nearest: Tensor

    @property
    def total_distance(self) -> float:
        """Mean distance of a test point to the training set."""
        return float(self.nearest.mean())

    @property
    def self_distance(self) -> float:
        """Mean distance of a test point to the training points of its class; every class counts the same."""
        return float(self.distances.diagonal().mean())

    @property
    def mutual_distance(self) -> float:
        """Mean distance of a test point to the training points of another class; every pair counts the same."""
        count = len(self.classes)
        return float(self.distances.sum() - self.distances.trace()) / (count * (count - 1))

    @property
    def total_cover(self) -> float | None:
        """rho_T = 1 - total_distance / sqrt(d); None for inputs outside the unit box."""
        return self._cover(self.total_distance)

    @property
    def self_cover(self) -> float | None:
        """SC = 1 - self_distance / sqrt(d); None for inputs outside the unit box."""
        return self._cover(self.self_distance)

    @property
    def mutual_cover(self) -> float | None:
        """MC = 1 - mutual_distance / sqrt(d); None for inputs outside the unit box."""
        return self._cover(self.mutual_distance)

    @property
    def cover_difference(self) -> float | None:
        """CD = SC - MC; None for inputs outside the unit box."""
        apart = (self.mutual_distance - self.self_distance) / math.sqrt(self.dimension)
        return apart if self.unit_box else None

    @property
    def cover_complexity(self) -> float:
        """CC = (1 - rho_T) / CD; higher is harder; inf where other classes are as near as one's own."""
        apart = self.mutual_distance - self.self_distance
        return self.total_distance / apart if apart > 0 else math.inf

    def _cover(self, distance: float) -> float | None:
        return 1 - distance / math.sqrt(self.dimension) if self.unit_box else None

    def uncovered(self, radius: float) -> float:
        """Return the share of test points at least `radius` away from every training point, 1 - h_T(radius).

        Derived: it is at most total_distance / radius (Markov), and it bounds the error on the test points of a
        classifier that is right on all points closer than `radius` to a training point.  A network that puts all its
        weight on the true class of every training point is one for radius = delta_f(1/2): the true class keeps more
        than 1/2.  `smoothness` finds at least delta_f; with an estimate from above, this is an estimate, no bound.

        Args:
            radius: above 0, in the unit of the inputs.

        Raises:
            ValueError: something else.
        """
        return float((self.nearest >= check_number("radius", radius, 0.0, open_low=True)).double().mean())

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record: sizes, distances, covers and the cover complexity."""
        names = ("train", "test", "dimension", "unit_box", "total_distance", "self_distance", "mutual_distance")
        covers = ("total_cover", "self_cover", "mutual_cover", "cover_difference", "cover_complexity")
        return [{"classes": len(self.classes)} | {name: getattr(self, name) for name in names + covers}]

    def to_json(self) -> str:
        """Return the record, the labels and the distances between classes as JSON."""
        return to_json(
            self.to_records()[0] | {"labels": self.classes.tolist(), "class_distances": self.distances.tolist()}
        )

    def __str__(self) -> str:
        rows = [{"quantity": name, "value": value} for name, value in self.to_records()[0].items()]
        return format_table(rows, title="cover complexity")


@torch.no_grad()
def cover_complexity(
    train_inputs: Tensor, train_targets: Tensor, test_inputs: Tensor, test_targets: Tensor
) -> CoverComplexity:
    """Return how far test points lie from training points, relative to how far the classes lie apart.

    CC = total / (mutual - self), as in the module.  Every test point is compared once with every training point, in
    float64, on the device of the inputs; the distances are exact up to the rounding of |x - y| itself.  Beyond the
    inputs it takes at most 64 B (B + d) bytes, B = 1024, and 24 bytes a test point and class (derived;
    inputs that are not contiguous are copied once).

    Args:
        train_inputs: finite numbers of any type, shape (n, ...).
        train_targets: whole-number labels, shape (n,).
        test_inputs: a sample of the law, shape (m, ...) with the same inner shape.
        test_targets: labels, shape (m,).

    Returns:
        The distances and what follows from them, on the CPU.  A single training or test point of a class is enough;
        repeated points change nothing but the weights of test points.

    Raises:
        ValueError: shapes, types or devices that do not fit; inputs that are not finite; fewer than two classes; a
            class without training or without test points; nothing but one repeated point.

    Source: Jin, Lu, Tang and Karniadakis 2019 (arXiv:1905.11427), as recalled; computation derived.
    """
    _check_part("train", train_inputs, train_targets)
    _check_part("test", test_inputs, test_targets)
    _check_alike(train_inputs, test_inputs)
    classes = _check_classes(train_targets, test_targets)
    found = _class_distances(train_inputs, train_targets, test_inputs, classes)
    parts = (train_inputs, test_inputs)
    unit_box = all(float(part.min()) >= 0 and float(part.max()) <= 1 for part in parts)
    sizes = len(train_inputs), train_inputs[0].numel()
    return cover_from_distances(found, test_targets, classes, *sizes, unit_box=unit_box)


@torch.no_grad()
def class_distances(train_inputs: Tensor, train_targets: Tensor, test_inputs: Tensor, classes: Tensor) -> Tensor:
    """Return how far each test point is from the nearest training point of each class.

    [p, i] = nn(x_p, T_i), inf for a class without training points here.  Of training sets in parts, the distances are
    the smallest of the parts' (derived), so that nested sets cost one pass; `cover_from_distances` goes on from there.

    Args:
        train_inputs: finite numbers of any type, shape (n, ...).
        train_targets: whole-number labels, shape (n,).
        test_inputs: shape (m, ...) with the same inner shape.
        classes: the labels of the columns, shape (K,); training points of other labels are left out.

    Returns:
        float64 on the CPU, shape (m, K), exact up to the rounding of |x - y| itself.

    Raises:
        ValueError: shapes, types or devices that do not fit; inputs that are not finite.

    Source: derived.
    """
    _check_part("train", train_inputs, train_targets)
    _check_part("test", test_inputs, torch.zeros(len(test_inputs), dtype=torch.int64))
    _check_alike(train_inputs, test_inputs)
    return _class_distances(train_inputs, train_targets, test_inputs, classes)


def cover_from_distances(
    found: Tensor, test_targets: Tensor, classes: Tensor, train: int, dimension: int, *, unit_box: bool
) -> CoverComplexity:
    """Return the cover complexity of distances between test points and classes that are known already.

    Args:
        found: [p, i] is the distance of test point p to the training points of class i, finite, shape (m, K).
        test_targets: labels, each one of `classes`, shape (m,).
        classes: the labels of the columns, rising, shape (K,), K at least 2.
        train: number of training points.
        dimension: numbers in an input.
        unit_box: whether all inputs lie in [0, 1]^d.

    Raises:
        ValueError: shapes that do not fit, distances that are not finite, a class without test points, a test point
            of another class, or nothing but zero distances.

    Source: Jin, Lu, Tang and Karniadakis 2019 (arXiv:1905.11427), as recalled; computation derived.
    """
    labels = test_targets.cpu()
    if found.shape != (len(labels), len(classes)) or len(classes) < 2 or not bool(found.isfinite().all()):
        raise ValueError(
            f"distances: got shape {tuple(found.shape)} for {len(labels)} test points and {len(classes)} classes; "
            "expected a finite number for each test point and class, and at least two classes"
        )
    if torch.unique(labels).tolist() != classes.tolist():
        raise ValueError(
            f"test points have labels {torch.unique(labels).tolist()}; expected all of {classes.tolist()}, no others"
        )
    distances = torch.stack([found[labels == label].mean(0) for label in classes], dim=1)
    if float(distances.max()) == 0:
        raise ValueError("all inputs are one and the same point: no distance tells classes apart")
    return CoverComplexity(classes, train, len(labels), dimension, unit_box, distances, found.amin(1))


def _class_distances(train_inputs: Tensor, train_targets: Tensor, test_inputs: Tensor, classes: Tensor) -> Tensor:
    train, test = train_inputs.flatten(1), test_inputs.flatten(1)
    centre = _mean(train)
    squares = torch.full((len(test), len(classes)), math.inf, dtype=torch.float64, device=test.device)
    with tqdm(total=len(test) * len(classes), desc="nearest neighbours", leave=False, disable=None) as bar:
        for column, label in enumerate(classes.tolist()):
            rows = (train_targets.to(train.device) == label).nonzero()[:, 0]
            for start in range(0, len(test), _BLOCK):
                points = test[start : start + _BLOCK].double()
                best = squares[start : start + _BLOCK, column]
                for first in range(0, len(rows), _BLOCK):
                    references = train[rows[first : first + _BLOCK]].double()
                    torch.minimum(best, _nearest(points, references, centre)[0], out=best)
                bar.update(len(points))
    return squares.sqrt().cpu()


@dataclass(frozen=True)
class Smoothness:
    """How far an input must move, at least, before a network's answer does.

    Attributes:
        epsilon: size of a change of the answer.
        pair_distance: smallest distance of two of the given inputs with such a change; inf where there is none.
        distance: smallest distance found on the segments between such inputs; at least delta_f(epsilon).
        inputs: number of inputs.
    """

    epsilon: float
    pair_distance: float
    distance: float
    inputs: int

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record of all fields."""
        return [vars(self).copy()]

    def to_json(self) -> str:
        """Return the record as JSON."""
        return to_json(self.to_records()[0])

    def __str__(self) -> str:
        return format_table(self.to_records(), title="smoothness, from above")


@torch.no_grad()
def smoothness(predict: Callable[[Tensor], Tensor], inputs: Tensor, epsilon: float = 0.5) -> Smoothness:
    """Return an upper estimate of how far inputs can move with no change of the network's answer.

    delta_f(epsilon) = sup {delta : |x - y| < delta implies |f(x) - f(y)| < epsilon}, with |x - y| Euclidean and
    |f(x) - f(y)| the largest difference of an entry.  Any two points whose answers differ by epsilon are at least
    delta_f apart: from every input to the nearest one with another answer, the segment is halved towards where the
    answer changes.  A stronger attack may find less, and then its value is the better estimate.

    Args:
        predict: takes inputs (m, ...) and returns answers (m, outputs), such as class probabilities.  It must treat
            inputs one by one: a network in evaluation mode.
        inputs: floating point, shape (m, ...), m at least 2, in a convex domain such as [0, 1]^d.
        epsilon: above 0.

    Returns:
        The estimate; inf where no two answers differ by epsilon.  Memory as for `cover_complexity`, and all answers.

    Raises:
        ValueError: inputs of other types or shapes, or answers of other shapes or not finite.

    Source: inverse modulus of continuity of Jin, Lu, Tang and Karniadakis 2019 (arXiv:1905.11427), as recalled; the
        norm of the answers and the search are choices made here.
    """
    check_number("epsilon", epsilon, 0.0, open_low=True)
    if inputs.ndim < 2 or len(inputs) < 2 or inputs[0].numel() == 0 or not inputs.is_floating_point():
        raise ValueError(
            f"inputs: got {inputs.dtype} of shape {tuple(inputs.shape)}; expected floating point numbers of shape "
            "(m, ...) with m >= 2"
        )
    _check_finite("inputs", inputs)
    answers = torch.cat([_answers(predict, part) for part in torch.split(inputs, _BLOCK)])
    flat = inputs.flatten(1)
    centre = _mean(flat)
    pair, distance = math.inf, math.inf
    for start in tqdm(range(0, len(flat), _BLOCK), desc="smoothness", leave=False, disable=None):
        points, own = flat[start : start + _BLOCK].double(), answers[start : start + _BLOCK]
        best = torch.full((len(points),), math.inf, dtype=torch.float64, device=points.device)
        partner = torch.zeros(len(points), dtype=torch.int64, device=points.device)
        for first in range(0, len(flat), _BLOCK):
            others = flat[first : first + _BLOCK].double()
            changed = torch.cdist(own, answers[first : first + _BLOCK], p=math.inf) >= epsilon
            squares, index = _nearest(points, others, centre, changed)
            partner = torch.where(squares < best, index + first, partner)
            best = torch.minimum(best, squares)
        rows = best.isfinite().nonzero()[:, 0]
        if len(rows):
            pair = min(pair, float(best.min().sqrt()))
            origin, target = inputs[start + rows], inputs[partner[rows]]
            distance = min(distance, _nearest_change(predict, origin, target, own[rows], epsilon))
    return Smoothness(float(epsilon), pair, distance, len(inputs))


def _nearest_change(
    predict: Callable[[Tensor], Tensor], origin: Tensor, target: Tensor, own: Tensor, epsilon: float
) -> float:
    """Return the smallest distance found from an origin to a point of its segment where the answer differs."""
    near, far = origin, target
    for _ in range(_BISECTIONS):
        middle = (near + far) / 2
        changed = (_answers(predict, middle) - own).abs().amax(1) >= epsilon
        changed = changed.reshape(-1, *[1] * (origin.ndim - 1))
        near, far = torch.where(changed, near, middle), torch.where(changed, middle, far)
    return float((far.double() - origin.double()).flatten(1).norm(dim=1).min())


def _answers(predict: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    answers = predict(inputs)
    if answers.ndim != 2 or len(answers) != len(inputs) or not bool(answers.isfinite().all()):
        raise ValueError(f"predict must return finite answers of shape ({len(inputs)}, outputs), got {answers.shape}")
    return answers.double()


def _nearest(
    points: Tensor, references: Tensor, centre: Tensor, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the squared distance of each point to its nearest reference, and the reference's index.

    A matrix product finds candidates: all references whose distance may, within the product's rounding, be the least.
    Their distances are then computed from differences, so that equal points are at distance 0, not at 1e-7.

    Args:
        points: float64, shape (p, d).
        references: float64, shape (r, d).
        centre: any point amid the data, shape (d,); products of small numbers round less.
        allowed: which references a point may take, shape (p, r); by default all.

    Returns:
        Shapes (p,) and (p,); inf and r where no reference is allowed.
    """
    a, b = points - centre, references - centre
    norms = b.square().sum(1)
    rough = torch.addmm(norms, a, b.T, alpha=-2)  # |a - b|^2 - |a|^2
    if allowed is not None:
        rough.masked_fill_(~allowed, math.inf)
    # Both the least value and the true one may be off by gamma_d (|a| + |b|)^2; centring adds a few roundings.
    unit = (points.shape[1] + 8) * torch.finfo(torch.float64).eps
    slack = 2 * unit * (a.norm(dim=1) + norms.max().sqrt()).square()
    least = rough.amin(1)
    limit = torch.where(least.isfinite(), least + slack, -math.inf)
    row, column = (rough <= limit[:, None]).nonzero(as_tuple=True)
    pairs = zip(torch.split(row, _BLOCK), torch.split(column, _BLOCK), strict=True)
    exact = torch.cat([(points[i] - references[j]).square().sum(1) for i, j in pairs])
    best = torch.full_like(least, math.inf).scatter_reduce(0, row, exact, "amin")
    first = exact == best[row]  # of equally near ones the first, so that results repeat
    index = torch.full((len(points),), len(references), device=points.device)
    return best, index.scatter_reduce(0, row[first], column[first], "amin")


def _check_finite(label: str, inputs: Tensor) -> None:
    # Squares, since a sum of squares beyond float64 would lose the nearest neighbour without a word.
    if not all(float(part.double().square().sum()) < 1e300 for part in torch.split(inputs, _BLOCK)):
        raise ValueError(f"{label} hold NaN, infinite or huge numbers; remove, repair or rescale them first")


def _mean(rows: Tensor) -> Tensor:
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in torch.split(rows, _BLOCK):
        total += part.double().sum(0)
    return total / len(rows)


def _check_part(label: str, inputs: Tensor, targets: Tensor) -> None:
    if inputs.ndim < 2 or len(inputs) == 0 or inputs[0].numel() == 0 or inputs.is_complex():
        raise ValueError(
            f"{label} inputs: got {inputs.dtype} of shape {tuple(inputs.shape)}; "
            "expected real numbers of shape (n, ...)"
        )
    if targets.shape != inputs.shape[:1] or targets.is_floating_point() or targets.is_complex():
        raise ValueError(
            f"{label} targets: got {targets.dtype} of shape {tuple(targets.shape)}; expected whole numbers of shape "
            f"({len(inputs)},), a label for each input"
        )
    _check_finite(f"{label} inputs", inputs)


def _check_alike(train_inputs: Tensor, test_inputs: Tensor) -> None:
    if train_inputs.shape[1:] != test_inputs.shape[1:] or train_inputs.device != test_inputs.device:
        raise ValueError(
            f"train inputs have shape {tuple(train_inputs.shape)} on {train_inputs.device}, test inputs "
            f"{tuple(test_inputs.shape)} on {test_inputs.device}; expected the same inner shape and device"
        )


def _check_classes(train_targets: Tensor, test_targets: Tensor) -> Tensor:
    train: Tensor = torch.unique(train_targets.cpu())
    test: Tensor = torch.unique(test_targets.cpu())
    if train.tolist() != test.tolist():
        without_train = sorted(set(test.tolist()) - set(train.tolist()))
        without_test = sorted(set(train.tolist()) - set(test.tolist()))
        raise ValueError(
            f"every class needs training and test points; labels without training points: {without_train}, "
            f"without test points: {without_test}"
        )
    if len(train) < 2:
        raise ValueError(f"cover complexity compares classes; all labels are {train.tolist()[0]}")
    return train
