"""What `specprune verify` does: find a file of a network and its data, and return the certificate that it earns."""

from __future__ import annotations

import importlib.resources
import os
from importlib.resources.abc import Traversable
from pathlib import Path

from specprune.analysis.certificate import SUFFIX, Certificate, certificate_of, from_file_bytes, load_network
from specprune.compress.vocabulary import IntegerNetwork
from specprune.testbed import CATALOG, load_dataset


def shipped_networks() -> dict[str, Traversable]:
    """Return the files of networks that come with the package, by name."""
    folder = importlib.resources.files("specprune.testbed") / "data"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(SUFFIX)), key=lambda file: file.name)
    return {file.name.removesuffix(SUFFIX): file for file in files}


def verified(
    file: str, data: str | None = None, data_dir: str | os.PathLike[str] | None = None, delta: float = 0.05
) -> Certificate:
    """Decode a network, count its errors on the training set, and return its certificate.

    Args:
        file: a path, or the name of a network that comes with the package.
        data: name of the data set; by default the network's name, if it comes with the package.
        data_dir: where to look for the data first.
        delta: allowed probability of failure, in (0, 1).

    Returns:
        The certificate.

    Raises:
        FileNotFoundError: there is no such file, or the data are nowhere.
        ValueError: the file is damaged or is for other data; or no data set was named.
    """
    network = _network(file)
    name = file if data is None else data
    if name not in CATALOG:
        missing = "no data set was named" if data is None else f"unknown data set {data!r}"
        raise ValueError(f"{file}: {missing}; add --data with one of {', '.join(CATALOG)}")
    return certificate_of(network, load_dataset(name, data_dir), delta)


def _network(file: str) -> IntegerNetwork:
    shipped = shipped_networks()
    if file in shipped:
        return from_file_bytes(shipped[file].read_bytes())
    if not Path(file).is_file():
        known = f"; networks that come with the package: {', '.join(shipped)}" if shipped else ""
        raise FileNotFoundError(f"{file}: no such file{known}")
    return load_network(file)
