"""Certificates: the numbers by hand, the verifier's agreement, and files that were tampered with."""

import ast
import dataclasses
import json
import os
import re
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import specprune
from specprune import _verify
from specprune.analysis.certificate import (
    MAGIC,
    Certificate,
    certificate_of,
    from_file_bytes,
    load_network,
    save_network,
    to_file_bytes,
    verify,
)
from specprune.bounds.code_length import code_length_bound, code_length_kl_bound
from specprune.compress.integer_network import integer_pixels, predict
from specprune.compress.language import encode, ideal_bits, length_in_bits
from specprune.compress.vocabulary import MAX_BYTES, VERSION, IntegerNetwork, LayerSpec
from specprune.testbed import Dataset, load_dataset

ROOT = Path(specprune.__file__).parents[1]
REAL_DATA = os.environ.get("SPECPRUNE_DATA", "")
SPEC = LayerSpec("conv", 2, 2, 1, 0, 1, relu=False)


def halves(n=400, seed=0, noise=0.05):
    """Two classes: the left or the right half of an image is brighter; some labels are wrong."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 128, (n, 1, 8, 8))
    labels = generator.integers(0, 2, n)
    for image, label in zip(pixels, labels, strict=True):
        image[0, :, 4 * label : 4 * label + 4] += 127
    wrong = generator.random(n) < noise
    return torch.from_numpy(pixels / 255).float(), torch.from_numpy(np.where(wrong, 1 - labels, labels))


def dataset(**changes):
    parts = dict(zip(("train_inputs", "train_targets"), halves(), strict=True))
    parts |= dict(zip(("test_inputs", "test_targets"), halves(100, 1), strict=True))
    return Dataset(**({"name": "halves", "classes": 2} | parts | changes))


def network(seed=None):
    """The sum over the left half against that over the right one; or anything."""
    weights = np.array([[[[1, 0], [1, 0]]], [[[0, 1], [0, 1]]]])
    if seed is not None:
        weights = np.random.default_rng(seed).integers(-1, 2, weights.shape)
    return IntegerNetwork(1, 4, False, (SPEC,), (weights,))


def with_checksum(word):
    return MAGIC + zlib.crc32(word).to_bytes(4, "big") + word


def test_the_certificate_by_hand():
    data = dataset()
    found = certificate_of(network(), data, 0.05)
    left = data.train_inputs[..., :4].double().sum((1, 2, 3))
    right = data.train_inputs[..., 4:].double().sum((1, 2, 3))
    errors = int(((right > left).long() != data.train_targets).sum())
    assert 5 < errors < 40
    assert (found.errors, found.n, found.test_n) == (errors, 400, 100)
    assert found.train_error == errors / 400
    assert found.test_error == found.test_errors / 100
    assert found.bits == length_in_bits(network())
    assert 0 < found.bits - found.header_bits - sum(found.layer_bits) < 2
    assert (found.header_bits, *found.layer_bits) == ideal_bits(network())
    assert (found.weights, found.nonzero, found.version) == (8, 4, VERSION)
    assert found.binomial == code_length_bound(errors, 400, found.bits, 0.05)
    assert found.kl == code_length_kl_bound(errors, 400, found.bits, 0.05)
    assert found.train_error < found.value < found.kl.value < 0.5


def test_test_images_are_reported_and_used_for_nothing():
    data = dataset()
    other = dataclasses.replace(data, test_targets=1 - data.test_targets, test_inputs=data.test_inputs.flip(0))
    ours, theirs = (certificate_of(network(), one) for one in (data, other))
    assert ours.test_errors != theirs.test_errors
    assert dataclasses.replace(theirs, test_errors=ours.test_errors) == ours


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_the_verifier_finds_what_the_maker_found(seed):
    made = certificate_of(network(seed), dataset(), 0.01)
    assert verify(to_file_bytes(network(seed)), dataset(), 0.01) == made


def test_tables_name_the_front_end_and_json_is_strict():
    found = certificate_of(network(), dataset())
    text = str(found)
    for word in ("halves", "sums of 4 x 4 pixels", f"language version {VERSION}", "at least 0.95", "400"):
        assert word in text
    record = json.loads(found.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert record["certificate"] == found.value
    assert record["front_end"] == "sums of 4 x 4 pixels"
    assert record == json.loads(json.dumps(found.to_records()[0]))
    hopeless = certificate_of(network(), dataset(train_targets=1 - dataset().train_targets))
    assert hopeless.binomial.vacuous == (hopeless.value >= 1)
    vacuous = dataclasses.replace(found, binomial=code_length_bound(400, 400, found.bits, 0.05))
    assert "vacuous" in str(vacuous)


def test_printed_certificates_are_rounded_up():
    found = certificate_of(network(), dataset())
    for errors in range(20, 60):
        other = dataclasses.replace(found, binomial=code_length_bound(errors, 400, found.bits, 0.05))
        text = str(other)
        said, tabled = re.search(r"at most ([0-9.]+)% of new", text), re.search(r"certificate +([0-9.]+)% ", text)
        assert 0 <= float(said[1]) / 100 - other.value < 1e-4
        assert 0 <= float(tabled[1]) / 100 - other.value < 1e-5


def test_it_works_on_the_digits():
    """A random network that answers at random: the certificate is about 1, and says so without complaint."""
    digits = load_dataset("digits")
    spec = LayerSpec("conv", 10, 4, 1, 0, 3, relu=False)
    weights = np.random.default_rng(0).integers(-3, 4, (10, 1, 4, 4))
    candidate = IntegerNetwork(1, 2, False, (spec,), (weights,))
    found = certificate_of(candidate, digits)
    wrong = predict(candidate, integer_pixels(digits.train_inputs)) != digits.train_targets
    assert found.errors == int(wrong.sum())
    assert 0.5 < found.train_error < found.value <= 1


def test_files_are_read_back(tmp_path):
    path = tmp_path / "deep" / "net.spnw"
    save_network(path, network())
    assert path.read_bytes() == to_file_bytes(network()) == with_checksum(encode(network()))
    assert load_network(path) == network()
    assert load_network(str(path)) == network()
    assert [file.name for file in path.parent.iterdir()] == ["net.spnw"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.spnw"
    save_network(path, network())

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", stop)
        with pytest.raises(KeyboardInterrupt):
            save_network(path, network(1))
    assert load_network(path) == network()
    assert len(list(tmp_path.iterdir())) == 1


def test_every_changed_byte_is_found():
    good = to_file_bytes(network())
    for place in range(len(good)):
        for change in range(1, 256):
            bad = bytearray(good)
            bad[place] ^= change
            with pytest.raises(ValueError, match=r"checksum|not a specprune network"):
                from_file_bytes(bytes(bad))


def test_every_changed_byte_of_a_word_with_a_new_checksum_is_an_error_or_another_network():
    word = encode(network())
    others = 0
    for place in range(len(word)):
        for change in range(1, 256):
            bad = bytearray(word)
            bad[place] ^= change
            try:
                found = from_file_bytes(with_checksum(bytes(bad)))
            except ValueError:
                continue
            others += 1
            assert encode(found) == bytes(bad)
            assert found != network()
    assert others  # the word is short: some of its neighbours are words as well


@pytest.mark.parametrize("checksum", [True, False])
def test_every_truncation_and_what_follows_are_found(checksum):
    word = encode(network())
    for size in range(len(word)):
        with pytest.raises(ValueError):
            from_file_bytes(with_checksum(word[:size]) if checksum else to_file_bytes(network())[: 8 + size])
    for rest in (b"\0", b"\1", b"spnw", b"\0" * 5000):
        with pytest.raises(ValueError):
            from_file_bytes(with_checksum(word + rest) if checksum else to_file_bytes(network()) + rest)
    for size in range(9):
        with pytest.raises(ValueError, match="not a specprune network file"):
            from_file_bytes(to_file_bytes(network())[:size])


def test_large_files_are_refused_without_reading_them(tmp_path):
    path = tmp_path / "large.spnw"
    with open(path, "wb") as stream:
        stream.write(to_file_bytes(network()))
        stream.truncate(1 << 36)  # 64 GiB of nothing, on paper
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"more than {MAX_BYTES} bytes"):
        load_network(path)
    assert time.perf_counter() - start < 1


def test_other_files_are_refused_with_their_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.spnw: no such file"):
        load_network(tmp_path / "none.spnw")
    for content in (b"", b"spnw", b"PK\3\4 and more", os.urandom(100)):
        (tmp_path / "odd.spnw").write_bytes(content)
        with pytest.raises(ValueError, match=r"odd\.spnw: "):
            load_network(tmp_path / "odd.spnw")


def test_another_version_says_so():
    word = encode(network())
    with pytest.raises(ValueError, match="version 9 of the language; this program reads version"):
        from_file_bytes(with_checksum(b"\x09" + word[1:]))


def test_data_that_do_not_fit_are_refused():
    data = dataset()
    colour = dataset(train_inputs=data.train_inputs.repeat(1, 3, 1, 1), test_inputs=data.test_inputs.repeat(1, 3, 1, 1))
    odd = dataset(train_inputs=data.train_inputs[..., :6, :], test_inputs=data.test_inputs[..., :6, :])
    for bad, match in (
        (colour, r"training images of shape \(400, 3, 8, 8\); the network expects \(n, 1, height, width\)"),
        (odd, "expected multiples of 4"),
        (dataset(classes=3), "halves has 3 classes; the network has 2"),
        (dataset(train_targets=data.train_targets * 0), "no training image of class 1"),
        (dataset(train_inputs=data.train_inputs[:30], train_targets=data.train_targets[:30]), "too few"),
    ):
        with pytest.raises(ValueError, match=match):
            certificate_of(network(), bad)
    for delta in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="delta"):
            certificate_of(network(), data, delta)


def test_too_few_images_says_how_many_are_needed():
    data = dataset()
    with pytest.raises(ValueError, match=r"30 training images are too few") as caught:
        certificate_of(network(), dataset(train_inputs=data.train_inputs[:30], train_targets=data.train_targets[:30]))
    needed = int(str(caught.value).split("classes; ")[1].split()[0])
    few = dataset(train_inputs=data.train_inputs[:needed], train_targets=data.train_targets[:needed])
    assert isinstance(certificate_of(network(), few), Certificate)
    fewer = dataset(train_inputs=data.train_inputs[: needed - 1], train_targets=data.train_targets[: needed - 1])
    with pytest.raises(ValueError, match="too few"):
        certificate_of(network(), fewer)


@dataclasses.dataclass
class Unchecked:
    """Data that no `Dataset` would hold."""

    name: str
    train_inputs: torch.Tensor
    train_targets: torch.Tensor
    test_inputs: torch.Tensor
    test_targets: torch.Tensor
    classes: int


def test_labels_that_are_none_are_refused():
    parts = {field.name: getattr(dataset(), field.name) for field in dataclasses.fields(Unchecked)}
    for change, match in (
        ({"train_targets": parts["train_targets"] + 1}, r"labels \[1, 2\]; expected 0 to 1"),
        ({"train_targets": parts["train_targets"][:-1]}, "400 training images, but labels of shape"),
        ({"test_targets": parts["test_targets"][:-1]}, "100 test images, but labels"),
        ({"train_inputs": parts["train_inputs"][:0]}, "with n >= 1"),
        ({"train_inputs": parts["train_inputs"] * 2}, "rescale them"),
    ):
        with pytest.raises(ValueError, match=match):
            certificate_of(network(), Unchecked(**(parts | change)))


# --- the command ---------------------------------------------------------------------------------------------------


def digits_network():
    spec = LayerSpec("conv", 10, 4, 1, 0, 3, relu=False)
    return IntegerNetwork(1, 2, False, (spec,), (np.random.default_rng(0).integers(-3, 4, (10, 1, 4, 4)),))


def test_verify_reads_files_and_networks_that_come_with_the_package(tmp_path, monkeypatch):
    expected = certificate_of(digits_network(), load_dataset("digits"), 0.1)
    path = tmp_path / "mine.spnw"
    save_network(path, digits_network())
    assert _verify.verified(str(path), "digits", delta=0.1) == expected
    monkeypatch.setattr(_verify, "shipped_networks", lambda: {"digits": path, "other": path})
    assert _verify.verified("digits", delta=0.1) == expected
    assert _verify.verified("other", "digits", delta=0.1) == expected
    with pytest.raises(ValueError, match="other: no data set was named; add --data with one of digits, mnist"):
        _verify.verified("other")
    with pytest.raises(FileNotFoundError, match="nothing: no such file; networks that come with the package: digits"):
        _verify.verified("nothing", "digits")


def test_verify_says_what_is_missing(tmp_path):
    path = tmp_path / "mine.spnw"
    save_network(path, digits_network())
    with pytest.raises(ValueError, match="no data set was named"):
        _verify.verified(str(path))
    with pytest.raises(ValueError, match="unknown data set 'letters'; add --data with one of"):
        _verify.verified(str(path), "letters")
    with pytest.raises(FileNotFoundError, match="none: no such file"):
        _verify.verified("none", "digits")


@pytest.mark.parametrize("name", sorted(_verify.shipped_networks()))
def test_networks_that_come_with_the_package_are_small_and_sound(name):
    content = _verify.shipped_networks()[name].read_bytes()
    assert len(content) < 10_000
    assert to_file_bytes(from_file_bytes(content)) == content


#: Training errors, bits, and a little more than they promise by Chernoff's form, inverted by hand.
SHIPPED = {
    "digits": (35, 583, 0.3224),
    "mnist": (1349, 2028, 0.0704),
    "fashion-mnist": (7917, 2367, 0.2239),
    "cifar10": (18771, 3472, 0.5300),
}


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_networks_that_come_with_the_package_earn_what_is_quoted(name):
    if name != "digits" and not (Path(REAL_DATA) / name).is_dir():
        pytest.skip(f"SPECPRUNE_DATA has no {name}")
    found = _verify.verified(name, data_dir=REAL_DATA or None)
    errors, bits, most = SHIPPED[name]
    assert (found.errors, found.bits) == (errors, bits)
    assert found.value < most


def own_imports(module):
    """The modules of this package that a module imports, and those that they import, by reading the files."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for node in ast.walk(ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("specprune."):
                waiting.append(node.module)
    return found


def test_whoever_checks_needs_little_code_and_none_of_the_search():
    """Decoder, front ends, whole-number inference, inversion of the binomial tail, and tables."""
    assert own_imports("specprune.analysis.certificate") == {
        "specprune.analysis.certificate",
        "specprune.bounds.bound",
        "specprune.bounds.code_length",
        "specprune.bounds.occam",
        "specprune.compress.front_ends",
        "specprune.compress.integer_network",
        "specprune.compress.language",
        "specprune.compress.range_coder",
        "specprune.compress.vocabulary",
        "specprune._files",
        "specprune._records",
    }
