"""The data sets: the packaged digits, the readers, and what is said when files are missing or wrong."""

import dataclasses
import gzip
import hashlib
import math
import os
import struct

import numpy as np
import pytest
import torch

from specprune.testbed import CATALOG, Dataset, load_dataset, randomize_labels, read_cifar_binary, read_idx
from specprune.testbed.catalog import RemoteFile


def idx_bytes(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture(autouse=True)
def no_other_data(monkeypatch, tmp_path):
    monkeypatch.delenv("SPECPRUNE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty-cache"))


@pytest.fixture
def tiny_mnist(monkeypatch):
    """Make "mnist" a set of 3 training and 2 test images of 2x2 pixels; return its four files' contents."""
    contents = {
        "train-images-idx3-ubyte": idx_bytes(np.arange(12, dtype=np.uint8).reshape(3, 2, 2) * 20),
        "train-labels-idx1-ubyte": idx_bytes(np.array([9, 0, 4], dtype=np.uint8)),
        "t10k-images-idx3-ubyte": idx_bytes(np.full((2, 2, 2), 255, dtype=np.uint8)),
        "t10k-labels-idx1-ubyte": idx_bytes(np.array([1, 2], dtype=np.uint8)),
    }
    downloads = tuple(
        RemoteFile(f"{name}.gz", hashlib.sha256(data).hexdigest(), len(data)) for name, data in contents.items()
    )
    tiny = dataclasses.replace(
        CATALOG["mnist"], input_shape=(1, 2, 2), train_size=3, test_size=2, downloads=downloads, mirrors=()
    )
    monkeypatch.setitem(CATALOG, "mnist", tiny)
    return contents


def write_all(folder, contents, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(data)) if packed else (folder / name).write_bytes(data)


def test_digits_are_fixed_images_in_the_unit_box():
    data = load_dataset("digits")
    assert data.train_inputs.shape == (1400, 1, 8, 8)
    assert data.test_inputs.shape == (397, 1, 8, 8)
    assert data.input_shape == (1, 8, 8)
    assert data.classes == 10
    assert float(data.train_inputs.max()) == 1.0
    assert float(data.train_inputs.min()) == 0.0
    # The whole table: sums of all pixels and labels of the published file, whatever the split.
    total = float(data.train_inputs.double().sum() + data.test_inputs.double().sum()) * 16
    assert total == 561718
    labels = torch.cat([data.train_targets, data.test_targets])
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_split_never_moves():
    digest = hashlib.sha256(load_dataset("digits").test_targets.numpy().tobytes()).hexdigest()
    assert digest == "3c0326f5d0f1a213d6137bdf01e42a7af7193ea2a43bd471330287e8f152882b"


def test_digits_train_and_test_share_no_row():
    data = load_dataset("digits")
    again = load_dataset("digits")
    assert torch.equal(data.test_inputs, again.test_inputs)
    rows = torch.cat([data.train_inputs, data.test_inputs]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 1797


def test_input_radius_is_the_norm_of_the_white_image():
    data = load_dataset("digits")
    assert data.input_radius == pytest.approx(float(torch.ones(1, 8, 8).norm()))
    assert float(data.train_inputs.flatten(1).norm(dim=1).max()) <= data.input_radius


def test_batches_are_views_in_order_and_can_be_repeated():
    data = load_dataset("digits")
    batches = data.train_batches(size=600)
    assert [len(targets) for _, targets in batches] == [600, 600, 200]
    for _ in range(2):
        assert torch.equal(torch.cat([inputs for inputs, _ in batches]), data.train_inputs)
    assert batches[1][0].untyped_storage().data_ptr() == data.train_inputs.untyped_storage().data_ptr()
    assert torch.equal(torch.cat([targets for _, targets in data.test_batches(100)]), data.test_targets)


def test_batches_stop_at_the_limit():
    batches = load_dataset("digits").test_batches(size=40, limit=100)
    assert [len(targets) for _, targets in batches] == [40, 40, 20]
    assert sum(len(targets) for _, targets in load_dataset("digits").test_batches(limit=10**6)) == 397


@pytest.mark.parametrize("arguments", [{"size": 0}, {"limit": 0}, {"limit": -3}])
def test_batches_refuse_sizes_below_one(arguments):
    with pytest.raises(ValueError, match="expected at least 1"):
        load_dataset("digits").train_batches(**arguments)


def test_to_moves_every_tensor():
    moved = load_dataset("digits").to("meta")
    tensors = moved.train_inputs, moved.train_targets, moved.test_inputs, moved.test_targets
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'imagenet'.*digits, mnist, fashion-mnist, cifar10"):
        load_dataset("imagenet")


def test_randomize_labels_changes_the_share_asked_for():
    data = load_dataset("digits")
    noisy = randomize_labels(data, 0.5, seed=3)
    changed = float((noisy.train_targets != data.train_targets).double().mean())
    assert 0.4 < changed < 0.5  # a tenth of the new labels are the old ones
    assert torch.equal(noisy.train_targets, randomize_labels(data, 0.5, seed=3).train_targets)
    assert not torch.equal(noisy.train_targets, randomize_labels(data, 0.5, seed=4).train_targets)
    assert torch.equal(noisy.test_targets, data.test_targets)
    assert randomize_labels(data, 0.0) is data
    with pytest.raises(ValueError, match=r"1\.5"):
        randomize_labels(data, 1.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_inputs": torch.zeros(3, 4)}, "expected torch.float32 of shape"),
        ({"train_inputs": torch.full((3, 1, 2, 2), 255.0)}, "rescale"),
        ({"train_inputs": torch.full((3, 1, 2, 2), math.nan)}, "rescale"),
        ({"train_targets": torch.zeros(2, dtype=torch.int64)}, "a label for each image"),
        ({"test_targets": torch.tensor([0, 2])}, "expected 0 to 1"),
        ({"test_inputs": torch.zeros(2, 1, 3, 3)}, "expected the same"),
    ],
)
def test_dataset_refuses_what_does_not_fit(change, message):
    good = {
        "name": "mine",
        "train_inputs": torch.zeros(3, 1, 2, 2),
        "train_targets": torch.tensor([0, 1, 1]),
        "test_inputs": torch.zeros(2, 1, 2, 2),
        "test_targets": torch.tensor([0, 1]),
        "classes": 2,
    }
    Dataset(**good)
    with pytest.raises(ValueError, match=message):
        Dataset(**(good | change))


@pytest.mark.parametrize("packed", [True, False])
def test_idx_round_trip(tmp_path, packed):
    array = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
    path = tmp_path / ("a.gz" if packed else "a")
    path.write_bytes(gzip.compress(idx_bytes(array)) if packed else idx_bytes(array))
    np.testing.assert_array_equal(read_idx(path), array)
    np.testing.assert_array_equal(read_idx(path, (4, 3, 2)), array)
    with pytest.raises(ValueError, match=r"4x3x2 uint8, expected 60000x28x28 uint8"):
        read_idx(path, (60000, 28, 28))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "none"),
        (b"\0\0\x08", "expected 00 00 08"),
        (b"PK\x03\x04 not idx at all", "expected 00 00 08"),
        (b"\0\0\x0d\x01" + struct.pack(">I", 1) + b"\0" * 4, "expected 00 00 08"),  # floats
        (b"\0\0\x08\x05" + b"\0\0\0\x01" * 5 + b"x", "number of dimensions"),
        (b"\0\0\x08\x03\0\0\0\x01\0\0", "within its header"),
        (idx_bytes(np.zeros((2, 3), np.uint8))[:-1], "2x3 uint8.*found"),
        (idx_bytes(np.zeros((2, 3), np.uint8)) + b"x", "2x3 uint8.*found"),
        (b"\0\0\x08\x03" + b"\xff" * 12 + b"x", "4294967295x4294967295x4294967295.*found a file of"),
    ],
)
def test_idx_refuses_wrong_files(tmp_path, packed, content, message):
    path = tmp_path / ("a.gz" if packed else "a")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_idx_never_unpacks_more_than_its_header_promises(tmp_path, monkeypatch):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros((2, 3), np.uint8)) + bytes(50_000_000)))
    taken = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: taken.append(size) or read(self, size))
    with pytest.raises(ValueError, match="found more"):
        read_idx(path)
    assert min(taken) >= 0
    assert sum(taken) < 100


def test_idx_reports_cut_and_damaged_gzip(tmp_path):
    path = tmp_path / "a.gz"
    whole = gzip.compress(idx_bytes(np.random.default_rng(0).integers(256, size=(50, 50)).astype(np.uint8)))
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    for content in (whole[:-5], whole[: len(whole) // 2], bytes(damaged), b"not gzip at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or truncated gzip"):
            read_idx(path)
    with pytest.raises(FileNotFoundError, match=r"b\.gz"):
        read_idx(tmp_path / "b.gz")


def test_files_are_found_in_order(tiny_mnist, tmp_path, monkeypatch):
    cache = tmp_path / "empty-cache" / "specprune"
    write_all(cache / "mnist", tiny_mnist)
    assert load_dataset("mnist").train_targets.tolist() == [9, 0, 4]
    write_all(tmp_path / "env", tiny_mnist, packed=False)  # files in the place itself, not gzipped
    monkeypatch.setenv("SPECPRUNE_DATA", str(tmp_path / "env"))
    (cache / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(b"broken")
    data = load_dataset("mnist")  # the broken file comes later in the order
    assert data.train_inputs.shape == (3, 1, 2, 2)
    np.testing.assert_allclose(data.train_inputs[0].flatten(), np.array([0, 20, 40, 60]) / 255, rtol=1e-6)
    write_all(tmp_path / "given" / "mnist", tiny_mnist)
    (tmp_path / "env" / "train-images-idx3-ubyte").write_bytes(b"broken")
    assert load_dataset("mnist", tmp_path / "given").test_targets.tolist() == [1, 2]
    with pytest.raises(ValueError, match="env"):
        load_dataset("mnist")


def test_missing_data_say_where_they_were_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECPRUNE_DATA", str(tmp_path / "env"))
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset("fashion-mnist", tmp_path / "given")
    for part in ("train-images-idx3-ubyte", "given", "env", "empty-cache", "`specprune data fashion-mnist`"):
        assert part in str(caught.value)


def test_an_incomplete_set_names_the_missing_file(tiny_mnist, tmp_path):
    write_all(tmp_path / "mnist", tiny_mnist)
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"but not t10k-labels-idx1-ubyte\..*`specprune data mnist`"):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("train-images-idx3-ubyte", np.zeros((3, 2, 3), np.uint8), "3x2x3 uint8, expected 3x2x2 uint8"),
        ("train-labels-idx1-ubyte", np.zeros(4, np.uint8), "4 uint8, expected 3 uint8"),
        ("t10k-labels-idx1-ubyte", np.array([1, 10], np.uint8), "label 10, expected labels from 0 to 9"),
        ("t10k-labels-idx1-ubyte", np.array([1, 3], np.uint8), "expected SHA-256"),
    ],
)
def test_wrong_contents_are_refused(tiny_mnist, tmp_path, file, array, message):
    write_all(tmp_path / "mnist", tiny_mnist | {file: idx_bytes(array)})
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset("mnist", tmp_path)
    assert file in str(caught.value)
    assert "`specprune data mnist`" in str(caught.value)


@pytest.fixture
def tiny_cifar(monkeypatch):
    """Make "cifar10" a set of six files of two records."""
    tiny = dataclasses.replace(CATALOG["cifar10"], train_size=10, test_size=2, file_bytes=2 * 3073)
    monkeypatch.setitem(CATALOG, "cifar10", tiny)
    records = np.random.default_rng(0).integers(256, size=(6, 2, 3073)).astype(np.uint8)
    records[:, :, 0] = np.arange(12).reshape(6, 2) % 10
    return dict(zip(tiny.files, records, strict=True))


@pytest.mark.parametrize("folder", ["cifar10", ".", "cifar10/cifar-10-batches-bin", "cifar-10-batches-bin"])
def test_cifar_is_found_and_read(tiny_cifar, tmp_path, folder):
    write_all(tmp_path / folder, {name: array.tobytes() for name, array in tiny_cifar.items()}, packed=False)
    data = load_dataset("cifar10", tmp_path)
    assert data.train_inputs.shape == (10, 3, 32, 32)
    assert data.train_targets.tolist() == list(range(10))
    assert data.test_targets.tolist() == [0, 1]
    # Record 1 of the third file: a plane of 1024 red pixels first, row by row.
    red = tiny_cifar["data_batch_3.bin"][1, 1:1025].reshape(32, 32) / np.float32(255)
    np.testing.assert_array_equal(data.train_inputs[5, 0].numpy(), red)


def test_cifar_refuses_wrong_files(tiny_cifar, tmp_path):
    path = tmp_path / "data_batch_1.bin"
    good = tiny_cifar["data_batch_1.bin"].tobytes()
    for content in (b"", good[:-1], good + b"x"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="multiple of 3073"):
            read_cifar_binary(path)
    path.write_bytes(b"\x0a" + good[1:])
    with pytest.raises(ValueError, match="label 10"):
        read_cifar_binary(path)
    contents = {name: array.tobytes() for name, array in tiny_cifar.items()}
    write_all(tmp_path, contents | {"test_batch.bin": good * 2}, packed=False)
    with pytest.raises(ValueError, match=r"test_batch\.bin: expected 2 records.*found 4.*`specprune data cifar10`"):
        load_dataset("cifar10", tmp_path)


REAL_DATA = os.environ.get("SPECPRUNE_DATA", "")  # read at import: the fixture above hides it from the tests


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_published_sets_load(name):
    try:
        data = load_dataset(name, REAL_DATA or None)
    except FileNotFoundError:
        pytest.skip(f"SPECPRUNE_DATA has no {name}")
    assert data.train_inputs.shape == (60000, 1, 28, 28)
    assert data.test_inputs.shape == (10000, 1, 28, 28)
    assert data.test_targets.bincount(minlength=10).sum() == 10000
    assert data.input_radius == 28.0
