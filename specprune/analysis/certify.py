"""The search for a certificate within a budget: train large, prune, train on the grid, search; again and again.

Every result is a valid one: the best network so far is on disk from the first minute, and nothing but its word's length
and its training errors decides what is best.  A state file beside it lets an interrupted run go on.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from specprune._files import load_arrays, lock_folder, save_arrays
from specprune._records import shortened
from specprune.analysis.certificate import (
    LabelledImages,
    certificate_of,
    load_network,
    save_network,
)
from specprune.analysis.certified import Certified, Step, contradictory_labels
from specprune.analysis.code_design import Design, default_design, design_of, rounded, scaled_design
from specprune.analysis.code_pruning import can_be_pruned_to, pruned_weights
from specprune.analysis.code_search import NEAR, CodeSearch
from specprune.analysis.code_training import (
    Latent,
    Recipe,
    TrainingImages,
    count_float_errors,
    random_start,
    start_from,
    train_epochs,
    training_images,
    usual_recipe,
)
from specprune.bounds.bound import check_count, check_number
from specprune.bounds.code_length import code_length_limit, samples_needed
from specprune.compress.integer_network import count_errors, integer_pixels
from specprune.compress.language import length_in_bits
from specprune.compress.vocabulary import IntegerNetwork

logger = logging.getLogger(__name__)

STARTS = ("pruned", "scratch")
_STATE = "certify state"
_BEST_FILE, _STATE_FILE = "best.spnw", "state.npz"
#: Of the whole budget: the large network's training, and the first training on the grid.
_LARGE_SHARE, _FIRST_SHARE = 0.1, 0.5
#: Of the whole budget: each later training, and each local search at most.
_LATER_SHARE, _SEARCH_SHARE = 0.1, 0.25
#: Of the largest learning rate: for the large network, and for later rounds, which must not forget where they start.
_LATER_RATE = 1 / 3
#: Examples that changes are tried on, of the certified errors, if that is more than usual.
_NEAR_SHARE = 0.4
_WIDER = 3
_PRUNING_IMAGES = 4000
_SAVE_SECONDS = 20.0
#: A schedule is made anew when it would end this share of its remaining time too early or too late.
_TOLERANCE = 0.1
_EPOCHS_TO_MEASURE = 5


def certify(
    dataset: LabelledImages,
    *,
    minutes: float,
    seed: int = 0,
    out: str | os.PathLike[str],
    start: str | None = None,
    design: Design | None = None,
    delta: float = 0.05,
    device: torch.device | str = "cpu",
) -> Certified:
    """Search for the network of the language with the lowest certificate, for so many minutes.

    A large network is trained in real numbers and pruned spectrally to the design's widths ("pruned"), or random
    weights are drawn ("scratch").  Then follow rounds of training on the grid with the bits in the loss, and of local
    search on the whole numbers; each later round starts from the best network.  A folder that holds an unfinished run
    of the same data, design, start and seed goes on with it.

    Args:
        dataset: the certificate is about; its test set is used for the report alone.
        minutes: budget of time, without interruptions; 0 returns what the folder holds already.
        seed: of all random choices.
        out: folder for best.spnw (the best network so far, always valid) and state.npz.
        start: "pruned" or "scratch"; None is "pruned" where the design can be pruned to.
        design: form of the network; `default_design` if None.
        delta: allowed probability of failure, in (0, 1).
        device: where to train and search; errors of the final certificate are counted on the CPU.

    Returns:
        What was found.

    Raises:
        ValueError: no time and no earlier result; too few examples for any promise; a missing class; a folder of
            another run, or one in which another run is at work; a pruned start of a design that cannot be pruned.
    """
    minutes = check_number("minutes", minutes, 0.0)
    delta = check_number("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    seed = check_count("seed", seed, low=0)
    chosen = default_design(dataset) if design is None else design
    prunable = can_be_pruned_to(chosen)
    start = start or ("pruned" if prunable else "scratch")
    if start not in STARTS:
        raise ValueError(f"start {start!r}: expected one of {', '.join(STARTS)}")
    if start == "pruned" and not prunable:
        raise ValueError(
            "a design of one layer, or with depthwise or tied ones, or with filters that do not follow a convolution "
            "without ReLU to a multiple of 4 channels, cannot be pruned to; choose start='scratch'"
        )
    _check_data(dataset, chosen, delta)
    with lock_folder(out):
        return _Run(dataset, chosen, Path(out), start, seed, delta, 60 * minutes, torch.device(device)).go()


def _check_data(dataset: LabelledImages, design: Design, delta: float) -> None:
    counts = torch.bincount(dataset.train_targets, minlength=dataset.classes)
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing:
        raise ValueError(
            f"{dataset.name}: no training image of class {', '.join(map(str, missing))}; "
            "a certificate about this data set needs all of them"
        )
    least = sum(math.prod(shape) for shape in design.shapes) // 2
    needed = samples_needed(least, delta, dataset.classes)
    if len(dataset.train_targets) < needed:
        raise ValueError(
            f"{dataset.name}: {len(dataset.train_targets)} training images are too few: words of this design rarely "
            f"take fewer than {least} bits, which need {needed} or more images to promise anything; "
            "give a smaller design"
        )


class _Run:
    """One search: its data, its clock, its best network, and its state on disk."""

    def __init__(
        self,
        dataset: LabelledImages,
        design: Design,
        folder: Path,
        start: str,
        seed: int,
        delta: float,
        seconds: float,
        device: torch.device,
    ) -> None:
        self.dataset, self.design, self.folder = dataset, design, folder
        self.start, self.seed, self.delta, self.budget, self.device = start, seed, delta, seconds, device
        self.pixels = integer_pixels(dataset.train_inputs)
        self.targets = dataset.train_targets
        self.round, self.used = 0, 0.0
        self.latent: Latent | None = None
        self.planned, self.deadline = 0, 0.0
        self.best: IntegerNetwork | None = None
        self.candidate: tuple[float, IntegerNetwork] | None = None  # of this round
        self.value = math.inf
        self.history: list[Step] = []
        self.contradictory = contradictory_labels(self.pixels, self.targets)
        self.began = self.saved = time.monotonic()

    def go(self) -> Certified:
        if self.contradictory:
            logger.warning(
                "%s: equal training images have different labels; at least %d errors are unavoidable",
                self.dataset.name,
                self.contradictory,
            )
        self._load()
        self.began = time.monotonic() - self.used
        if self.best is None and self.budget <= self.used:
            raise ValueError(
                f"{self.folder}: a budget of {self.budget / 60:g} minutes leaves no time to search, and no earlier "
                "result is there; give some minutes"
            )
        if not self._out_of_time():
            self._search()
        assert self.best is not None
        certificate = certificate_of(self.best, self.dataset, self.delta)
        return Certified(
            self.best, certificate, tuple(self.history), self.start, self.seed, self.elapsed, self.contradictory
        )

    @property
    def elapsed(self) -> float:
        """Seconds used, those before an interruption included."""
        return time.monotonic() - self.began

    def _out_of_time(self) -> bool:
        return self.elapsed >= self.budget

    def _search(self) -> None:
        images = self._images(self.design)
        with tqdm(total=round(self.budget), unit="s", disable=None, desc=f"certify {self.dataset.name}") as bar:
            self.bar = bar
            if self.latent is None and self.round == 0:
                self._save()  # whose folder this is; a kill may come between the first network and the next state
                # A network from the first minute on, however long the large one takes.
                self._offer_rounded(images, random_start(self.design, self.seed).to(self.device), "random weights")
                self._save()
                self.latent = self._first_latent()
                self._offer_rounded(images, self.latent, "start")
            while not self._out_of_time():
                self._train(images)
                if self._out_of_time():
                    break  # with more minutes, the training goes on from here
                self._local_search(images)
                self.round += 1
                self.latent, self.candidate, self.planned = None, None, 0
            self._save()

    def _images(self, design: Design) -> TrainingImages:
        return training_images(design, self.pixels.to(self.device), self.targets.to(self.device))

    def _first_latent(self) -> Latent:
        scratch = self.start == "scratch"
        latent = random_start(self.design, self.seed) if scratch else start_from(self._pruned_weights(), self.design)
        return latent.to(self.device)

    def _pruned_weights(self) -> list[Tensor]:
        """Train a wider network in real numbers, and prune it to the design's widths."""
        wide = scaled_design(self.design, _WIDER)
        images = self._images(wide)
        latent = random_start(wide, self.seed).to(self.device)
        epochs = self._affordable(wide, images, latent, _LARGE_SHARE, whole=False)
        train_epochs(
            wide,
            images,
            latent,
            epochs,
            seed=self.seed,
            recipe=self._recipe(False),
            whole=False,
            after_epoch=self._tick,
        )
        some = torch.randperm(len(self.targets), generator=torch.Generator().manual_seed(self.seed))[:_PRUNING_IMAGES]
        found = pruned_weights(wide, latent.weights, self.design, images.maps[0][some], self.seed)
        logger.info("pruned from %s to %s channels", [s[0] for s in wide.shapes], [s[0] for s in self.design.shapes])
        return found

    def _recipe(self, first: bool) -> Recipe:
        usual = usual_recipe(self.design)
        return usual if first else dataclasses.replace(usual, learning_rate=_LATER_RATE * usual.learning_rate)

    def _affordable(
        self, design: Design, images: TrainingImages, latent: Latent, share: float, *, whole: bool = True
    ) -> int:
        """Return how many epochs fit into a share of the budget, by the speed of a twentieth of one on a copy."""
        count = max(images.n // 20, 1)
        part = TrainingImages(images.maps[:, :count], images.targets[:count])
        seconds = math.inf
        for _ in range(2):  # the first time, libraries are still being prepared
            copy = Latent([w.clone() for w in latent.weights], latent.temperature.clone())
            begin = time.monotonic()
            train_epochs(design, part, copy, 1, seed=self.seed, batch=min(_batch(images.n), count), whole=whole)
            seconds = min(seconds, (time.monotonic() - begin) * images.n / count)
        return max(1, int(min(share * self.budget, self.budget - self.elapsed) / max(seconds, 1e-6)))

    def _train(self, images: TrainingImages) -> None:
        """Train on the grid: from the start in the first round, from the best network in later ones."""
        first = self.round == 0
        if self.latent is None:
            assert self.best is not None
            weights = [torch.tensor(array, dtype=torch.float32) for array in self.best.weights]
            self.latent = Latent(weights, random_start(self.design, 0).temperature).to(self.device)
        if not self.planned:
            share = _FIRST_SHARE if first else _LATER_SHARE
            self.planned = self._affordable(self.design, images, self.latent, share)
            self.deadline = min(self.elapsed + share * self.budget, self.budget)
        mark = self.latent.epoch, self.elapsed

        def after_epoch(state: Latent) -> bool:
            self._offer_rounded(images, state, f"training {self.round + 1}")
            # A schedule that is cut off ends at a high learning rate: it must fit into its time on a busy machine too.
            pace = (self.elapsed - mark[1]) / (state.epoch - mark[0])
            late = self.elapsed + (self.planned - state.epoch) * pace - self.deadline
            replan = state.epoch < self.planned and abs(late) > _TOLERANCE * (self.deadline - self.elapsed)
            if replan and state.epoch - mark[0] >= _EPOCHS_TO_MEASURE:
                self.planned = state.epoch + max(1, int((self.deadline - self.elapsed) / pace))
                return True
            return self._tick(state)

        while self.latent.epoch < self.planned and not self._out_of_time():
            train_epochs(
                self.design,
                images,
                self.latent,
                self.planned,
                seed=self.seed + 7919 * self.round,
                recipe=self._recipe(first),
                batch=_batch(images.n),
                after_epoch=after_epoch,
            )

    def _offer_rounded(self, images: TrainingImages, latent: Latent, phase: str) -> None:
        weights = [rounded(w.detach(), each.levels) for w, each in zip(latent.weights, self.design.owners, strict=True)]
        self._offer(self.design.network(weights), count_float_errors(images, weights, self.design), phase)

    def _local_search(self, images: TrainingImages) -> None:
        assert self.best is not None
        # A round that ended elsewhere is searched there: it may lead lower than what has been searched before.
        start = self.candidate[1] if self.candidate is not None else self.best
        near = max(NEAR, int(_NEAR_SHARE * self.value * images.n))
        search = CodeSearch(start, self.design, images, delta=self.delta, seed=self.seed + self.round, near=near)
        until = min(self.elapsed + _SEARCH_SHARE * self.budget, self.budget)
        pairs, idle = False, 0
        while self.elapsed < until and idle < 2:
            kept = search.round(pairs=pairs, out_of_time=lambda: self.elapsed >= until)
            if kept:
                self._offer(search.network(), search.errors, f"search {self.round + 1}")
            idle = 0 if kept else idle + 1
            pairs = not pairs if kept < 3 else pairs
            self._tick()

    def _offer(self, network: IntegerNetwork, errors: int, phase: str) -> None:
        """Note a network of this round, and write it if none had a lower certificate."""
        bits = length_in_bits(network)
        value = code_length_limit(errors, len(self.targets), bits, self.delta)
        if self.candidate is None or value < self.candidate[0]:
            self.candidate = value, network
        if value >= self.value:
            return
        self.best, self.value = network, value
        save_network(self.folder / _BEST_FILE, network)
        self.history.append(Step(self.elapsed, phase, value, errors, bits))
        share = 100 * errors / len(self.targets)
        logger.info(
            "%6.0f s  %s: %.3f %% (training error %.3f %%, %d bits)", self.elapsed, phase, 100 * value, share, bits
        )

    def _tick(self, _: Latent | None = None) -> bool:
        """Show progress, save now and then, and say whether time is up."""
        self.bar.update(min(round(self.elapsed), self.bar.total) - self.bar.n)
        if math.isfinite(self.value):
            self.bar.set_postfix_str(f"{self.value:.3%}")
        if time.monotonic() - self.saved > _SAVE_SECONDS:
            self._save()
        return self._out_of_time()

    def _identity(self) -> dict[str, Any]:
        return {
            "data": self.dataset.name,
            "n": len(self.targets),
            "design": repr(self.design),
            "start": self.start,
            "seed": self.seed,
            "delta": self.delta,
        }

    def _save(self) -> None:
        self.saved = time.monotonic()
        arrays: dict[str, np.ndarray] = {}
        if self.latent is not None:
            latent = self.latent
            parts = (*latent.weights, latent.temperature), *latent.moments
            for name, tensors in zip(("weight", "first", "second"), parts, strict=True):
                arrays |= {f"{name}{i}": tensor.detach().cpu().numpy() for i, tensor in enumerate(tensors)}
        header = {
            "kind": _STATE,
            "identity": self._identity(),
            "round": self.round,
            "seconds": self.elapsed,
            "planned": self.planned,
            "deadline": self.deadline,
            "epoch": self.latent.epoch if self.latent is not None else 0,
            "history": [dataclasses.asdict(step) for step in self.history],
        }
        save_arrays(self.folder / _STATE_FILE, arrays, header)

    def _load(self) -> None:
        """Go on where an earlier run of the same kind stopped."""
        state = self.folder / _STATE_FILE
        if not state.exists():
            if (self.folder / _BEST_FILE).exists():
                raise ValueError(f"{self.folder}: holds a network but no state of a run; choose another folder")
            return
        arrays, header = load_arrays(state, _STATE)
        if header.get("identity") != self._identity():
            raise ValueError(
                f"{self.folder}: holds a run of {shortened(str(header.get('identity')))}; this one is "
                f"{self._identity()}; choose another folder"
            )
        if not (self.folder / _BEST_FILE).exists():
            if header.get("history"):
                raise ValueError(
                    f"{self.folder}: holds the state of a run but not its {_BEST_FILE}; put that back, or choose "
                    "another folder"
                )
            return  # stopped before its first network
        try:
            self._take(arrays, header)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{state}: a damaged state of a run ({shortened(str(error))})") from error
        self.best = load_network(self.folder / _BEST_FILE)
        if design_of(self.best) != self.design:
            raise ValueError(f"{self.folder / _BEST_FILE}: a network of another design than this run's")
        errors = count_errors(self.best, self.pixels, self.targets)
        self.value = code_length_limit(errors, len(self.targets), length_in_bits(self.best), self.delta)
        logger.info("%s: going on after %.0f s at %.3f %%", self.folder, self.used, 100 * self.value)

    def _take(self, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
        """Take over what a state says, which is what `_save` wrote."""
        self.round, self.planned = (_number(header[key], (int,)) for key in ("round", "planned"))
        self.used, self.deadline = (_number(header[key]) for key in ("seconds", "deadline"))
        epoch = _number(header["epoch"], (int,))
        self.history = [Step(**step) for step in header["history"]]
        for step in self.history:
            _number(step.seconds), _number(step.value), _number(step.errors, (int,)), _number(step.bits, (int,))
            if type(step.phase) is not str:
                raise ValueError(f"phase {step.phase!r}: expected text")
        shapes = (*self.design.shapes, ())
        names = [f"{name}{i}" for name in ("weight", "first", "second") for i in range(len(shapes))]
        if not arrays:
            return
        if set(arrays) != set(names):
            raise ValueError(f"arrays {sorted(arrays)[:5]}, expected {names}")
        for name, shape in zip(names, shapes * 3, strict=True):
            array = arrays[name]
            if array.dtype != np.float32 or array.shape != shape or not np.isfinite(array).all():
                raise ValueError(
                    f"{name}: {array.dtype} of shape {array.shape}, expected finite float32 of shape {shape}"
                )
        tensors = [torch.from_numpy(arrays[name].copy()) for name in names]
        weights, first, second = (tensors[k : k + len(shapes)] for k in range(0, len(tensors), len(shapes)))
        self.latent = Latent(weights[:-1], weights[-1], epoch, (first, second)).to(self.device)


def _number(value: Any, kinds: tuple[type, ...] = (int, float)) -> Any:
    if type(value) not in kinds or value < 0:
        raise ValueError(f"{value!r}: expected a number that is not negative")
    return value


def _batch(n: int) -> int:
    """Return the examples a step: fewer where the training set is small."""
    return max(1, min(100, n // 20))
