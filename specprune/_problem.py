"""The network and the data that a command line names: a checkpoint or a user's own factories."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specprune.compress.batches import batch_size
from specprune.testbed import Dataset, Recipe, initial_network, load_checkpoint, load_dataset, randomize_labels

BATCH = 1000


@dataclass(frozen=True)
class Problem:
    """A trained network with its training and test set.

    Args:
        model: the network.
        train: training batches, all of them; bounds, trade-offs and error rates need labels.
        test: test batches, if there are any.
        input_radius: bound on the norm of every possible input, where it is known.
        label: what to call it in titles.
        dataset: the testbed's data set, if it is one.
        initial: the network as it was before training, where that is known.
        recipe: how it was trained, where that is known.
    """

    model: nn.Module
    train: Iterable[Any]
    test: Iterable[Any] | None
    input_radius: float | None
    label: str
    dataset: Dataset | None
    initial: nn.Module | None = None
    recipe: Recipe | None = None

    def calibration(self, samples: int) -> list[Any]:
        """Return the first training batches, up to about `samples` samples."""
        if self.dataset is not None:
            return list(self.dataset.train_batches(min(BATCH, samples), samples))
        taken, count = [], 0
        for batch in self.train:
            if count >= samples:
                break
            taken.append(batch)
            count += batch_size(batch)
        return taken


def load_problem(
    *,
    weights: str | os.PathLike[str] | None,
    model: str | None,
    data: str | None,
    data_dir: str | None,
    device: str,
) -> Problem:
    """Return the network and data that the options name.

    Args:
        weights: a checkpoint of `specprune train`; with `model`, a state_dict that torch.save wrote.
        model: "package.module:factory", where factory() returns the network.
        data: a data set's name, or "package.module:factory", where factory() returns (train, test), each a
            re-iterable of batches (inputs, targets) or, for pruning alone, of inputs; or a testbed `Dataset`.
        data_dir: where to look for named data sets first.
        device: where model and named data go.

    Raises:
        ValueError: options that do not fit together, or a factory that fails.
        FileNotFoundError: there is no such weights file or data set.
    """
    target = torch_device(device)
    if model is None:
        if weights is None:
            raise ValueError(
                "no network: give --weights FILE (from 'specprune train') or --model package.module:factory"
            )
        trained = load_checkpoint(weights)
        recipe = trained.recipe
        net, label = trained.model, f"{recipe.data}, {recipe.net}"
        data = data or recipe.data
    else:
        net, label = _own_model(model, weights), model
        if data is None:
            raise ValueError("no data: give --data NAME or --data package.module:factory")
    net = net.to(target)
    if ":" not in data:
        dataset = load_dataset(data, data_dir)
        if model is None:
            if (dataset.input_shape, dataset.classes) != (tuple(trained.input_shape), trained.classes):
                raise ValueError(
                    f"--weights {weights} is a network for images of shape {tuple(trained.input_shape)} and "
                    f"{trained.classes} classes; {data} has {dataset.input_shape} and {dataset.classes}"
                )
            if data == recipe.data and recipe.random_labels > 0:  # bounds are about the labels it was trained on
                dataset = randomize_labels(dataset, recipe.random_labels, recipe.label_seed)
        initial = None if model is not None else initial_network(trained).to(target)
        known = None if model is not None else recipe
        return _from_dataset(net, dataset.to(target), label, initial, known)
    made = call_factory("--data", data)
    if isinstance(made, Dataset):
        return _from_dataset(net, made.to(target), label)
    if not isinstance(made, tuple | list) or len(made) not in (1, 2):
        raise ValueError(
            f"--data {data}: the factory returned {type(made).__name__}, expected (train, test), each a re-iterable of "
            "(inputs, targets) batches"
        )
    return Problem(net, made[0], made[1] if len(made) == 2 else None, None, label, None)


def torch_device(name: str) -> torch.device:
    """Return the device called `name`.

    Raises:
        ValueError: torch does not know it, or this machine does not have it.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name}: not usable on this machine ({reason}); try cpu or cuda") from error
    return device


def call_factory(option: str, path: str) -> Any:
    """Import "package.module:factory" and return what factory() returns.

    The module that is named is looked for in the current folder first; whatever else is imported, by this program or
    by that module, is looked for there last, so that no file beside it can take the place of a library.  (With `python
    -m specprune`, Python itself looks there first.)

    Raises:
        ValueError: it cannot be imported, is not callable, or fails.
    """
    factory = _import(option, path)
    try:
        return factory()
    except Exception as error:  # the user's own code may raise anything; the reason goes on in one line
        raise ValueError(f"{option} {path}: calling it failed with {type(error).__name__}: {error}") from error


def _import(option: str, path: str) -> Callable[[], Any]:
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"{option} {path}: expected package.module:factory")
    folder = os.getcwd()
    if "" not in sys.path and folder not in sys.path:
        sys.path.append(folder)
    top = module_name.partition(".")[0]
    try:
        if top not in sys.modules:
            _import_from(folder, top)
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing the user's module runs the user's code
        raise ValueError(f"{option} {path}: cannot import it ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise ValueError(f"{option} {path}: is a {type(found).__name__}, expected a function without arguments")
    return found


def _import_from(folder: str, name: str) -> None:
    """Import a module or package from a folder, if it is there; one without __init__.py is left to the usual way."""
    spec = PathFinder.find_spec(name, [folder])
    if spec is None or spec.loader is None:
        return
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise


def _own_model(path: str, weights: str | os.PathLike[str] | None) -> nn.Module:
    model = call_factory("--model", path)
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {path}: the factory returned {type(model).__name__}, expected a torch.nn.Module")
    if weights is not None:
        if not Path(weights).is_file():
            raise FileNotFoundError(f"--weights {weights}: no such file")
        try:
            _check_archive(weights)
            state = torch.load(weights, map_location="cpu", weights_only=True)
            model.load_state_dict(state)
        except Exception as error:  # torch raises pickle, zip and runtime errors for a wrong file
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"--weights {weights}: expected a state_dict saved by torch.save that fits {path} ({reason})"
            ) from error
    return model


def _check_archive(path: str | os.PathLike[str]) -> None:
    """Refuse what PyTorch would unpack or allocate before it looks: packed records, and its format before 1.6."""
    if not zipfile.is_zipfile(path):
        raise ValueError("not in the format of PyTorch 1.6 and later; an older file can be loaded and saved again")
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed or sum(record.file_size for record in records) > Path(path).stat().st_size:
        raise ValueError("its records are packed, or larger than the file; torch.save does not write such files")


def _from_dataset(
    model: nn.Module,
    dataset: Dataset,
    label: str,
    initial: nn.Module | None = None,
    recipe: Recipe | None = None,
) -> Problem:
    return Problem(
        model,
        dataset.train_batches(BATCH),
        dataset.test_batches(BATCH),
        dataset.input_radius,
        label,
        dataset,
        initial,
        recipe,
    )
