"""Files from somebody else: every reader refuses what is damaged or made to harm, quickly, in little memory, unharmed.

`benchmarks/stress/files.py` is the whole campaign; here are a sample of it, and a test for each failure that it found.
"""

import gzip
import io
import json
import os
import struct
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "stress"))

import attacks
import files
import hostile_readers
from mutations import Bomb, npy, npy_raw, pickled, zipped

from specprune import _measures, _problem
from specprune._files import load_arrays, read_json, read_lines, save_arrays
from specprune._records import from_json, to_json
from specprune.cli import main
from specprune.compress import Moments, load_pruned, save_pruned
from specprune.figures.data_files import read_record, write_record
from specprune.figures.gallery import redraw
from specprune.testbed import download_dataset, load_checkpoint, load_zoo, read_idx, train_zoo, zoo_grid
from specprune.testbed.catalog import RemoteFile, Source
from specprune.testbed.datasets import load_dataset
from specprune.testbed.download import _extract, _find_fault, _try_mirror

NAMES = (
    *("idx files", "CIFAR-10 files", "downloaded files", "CIFAR-10 archive", "arrays (_files)"),
    *("pruned dense network", "pruned conv network", "low-rank network", "trained network", "moments"),
    *("state_dict (--weights)", "certificate words", "certify state", "zoo manifest", "zoo shard", "measured.jsonl"),
    *("figure data", "parts of figures"),
)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return {
        reader.name: reader for reader in hostile_readers.all_readers(tmp_path_factory.mktemp("seeds"), drawn=False)
    }


def test_all_readers_are_attacked(readers):
    assert tuple(readers) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_of_the_campaign(name, readers, tmp_path):
    tally = files.attack(readers[name], 20, 1, tmp_path, cuts=3)
    assert tally.failures == 0, tally.examples
    assert tally.refused > 20
    assert tally.accepted >= 1  # the sound files
    assert tally.tried == tally.refused + tally.accepted


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda path: 1 / 0, "ZeroDivisionError"),
        (lambda path: np.zeros(1 << 29), "MemoryError"),
        (lambda path: exec("1"), "did exec"),
        (lambda path: os.system("true"), "did os.system"),
        ((lambda path: (path.parent / "x").write_text("x")), "did open"),
        (lambda path: __import__("pickle").loads(pickled(os.devnull)), "did pickle.find_class"),
        (lambda path: 7, "accepted, but AssertionError"),
        (lambda path: os.kill(os.getpid(), 9), "died"),
    ],
)
def test_the_campaign_sees_what_it_is_for(fault, reason, tmp_path):
    """A reader that does wrong on hostile files alone is found out."""

    def read(path):
        content = path.read_bytes()
        if content not in (b"sound", b"hostile"):
            raise ValueError("neither")
        return "sound" if content == b"sound" else fault(path)

    def check(found):
        assert found == "sound"

    def mutate(content, rng):
        return b"hostile"

    reader = hostile_readers.Reader("faulty", (hostile_readers.Seed("x", b"sound", mutate),), read, check, "none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "contents", lambda *_: iter([("one", b"hostile")]))
        patch.setattr(files, "places", lambda *_: iter(()))
        tally = files.attack(reader, 0, 0, tmp_path)
    assert tally.failures == 1
    assert reason in next(iter(tally.reasons))


# Arrays with a header.


@pytest.fixture
def arrays(tmp_path):
    path = tmp_path / "a.npz"
    save_arrays(path, {"x": np.arange(6.0).reshape(2, 3)}, {"kind": "test"})
    return path


def replaced(path, name, content, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path) as archive:
        parts = [(info.filename, archive.read(info)) for info in archive.infolist()]
    path.write_bytes(zipped([(n, content if n == name else data) for n, data in parts], method))


def refused(path, match=""):
    with pytest.raises(ValueError, match=f"not a readable specprune test file.*{match}") as caught:
        load_arrays(path, "test")
    cause = caught.value
    while cause is not None:
        assert not isinstance(cause, MemoryError)
        cause = cause.__cause__ or cause.__context__
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("shape", ["(1099511627776,)", "(4294967296, 4294967296)", "(3,)", "(0, 9223372036854775807)"])
@pytest.mark.parametrize("name", ["x.npy", "__header__.npy"])
def test_sizes_that_lie_allocate_nothing(arrays, shape, name):
    replaced(arrays, name, npy("<f8", shape, b"abc"))
    refused(arrays)


@pytest.mark.parametrize("header", [b"{'descr': [", b"{'a': '''", b"  x\n y", b"(" * 4000, b"1" + b"+1" * 4000])
def test_headers_of_arrays_are_not_evaluated(arrays, header):
    """NumPy's own parser raised tokenize.TokenError and IndentationError."""
    replaced(arrays, "x.npy", npy_raw(header, b"x"))
    refused(arrays, "not of numbers")


@pytest.mark.parametrize("descr", ["|O", "<M8[ns]", "|V8", "|S8", "<U2", "[('a', '<f8')]", ">f8", "<f16"])
def test_arrays_that_are_not_of_numbers_are_refused(arrays, descr):
    replaced(arrays, "x.npy", npy(descr, "(1,)", bytes(8)))
    refused(arrays, "not of numbers")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_only_deflate_is_unpacked(arrays, method):
    """64 KB of bzip2 hold gigabytes, and damaged LZMA raised LZMAError."""
    replaced(arrays, "", b"", method)
    refused(arrays, "cannot have")


def test_entries_that_overlap_are_refused(arrays):
    data = arrays.read_bytes()
    end = data.rindex(b"PK\5\6")
    start = struct.unpack("<I", data[end + 16 : end + 20])[0]
    last = data.rindex(b"PK\1\2")
    more = b"".join(data[last:end].replace(b"x.npy", b"%c.npy" % k) for k in range(97, 120))
    middle = data[start:end] + more
    arrays.write_bytes(
        data[:start] + middle + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 25, 25, len(middle), start, 0)
    )
    refused(arrays, "bytes together")


@pytest.mark.parametrize("name", ["x", "../../evil", "x.npy", "__header__.npy", "a" * 2000 + ".npy"])
def test_members_that_are_no_arrays_or_there_twice_are_refused(arrays, name):
    parts = [(name, b"text")]
    with zipfile.ZipFile(arrays) as archive:
        parts += [(info.filename, archive.read(info)) for info in archive.infolist()]
    arrays.write_bytes(zipped(parts))
    refused(arrays, "the member '")


def test_names_like_paths_are_only_names(arrays):
    with zipfile.ZipFile(arrays, "a") as archive:
        archive.writestr("../../evil.npy", npy("<f4", "(1,)", b"abcd"))
    assert set(load_arrays(arrays, "test")[0]) == {"x", "../../evil"}
    assert not (arrays.parent.parent / "evil.npy").exists()


def test_a_header_that_unpacks_to_far_more_is_refused(arrays):
    text = b'{"kind": "' + b"x" * 20_000_000 + b'"}'
    replaced(arrays, "__header__.npy", npy("|u1", f"({len(text)},)", text))
    refused(arrays, "a header of 200000")


def test_headers_as_we_write_them_are_never_too_large(tmp_path):
    """Thousands of equal records are packed as tightly as records get."""
    record = {"setting": {"data": "digits", "family": "mlp", "width": 160}, "train_loss": 0.01}
    header = {"kind": "test", "networks": [record | {"seed": k} for k in range(20_000)]}
    save_arrays(tmp_path / "a.npz", {}, header)
    assert load_arrays(tmp_path / "a.npz", "test")[1] == header


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 3), (1, 2, 3, 4)])
@pytest.mark.parametrize("dtype", ["?", "b", "u1", "i2", "u4", "i8", "f2", "f4", "f8", "c8", "c16"])
def test_arrays_come_back_in_every_shape_order_and_type(dtype, shape, order, tmp_path):
    array = np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype), order=order)
    save_arrays(tmp_path / "a.npz", {"x": array}, {"kind": "test"})
    with np.load(tmp_path / "a.npz") as archive:
        twin = archive["x"]
    found = load_arrays(tmp_path / "a.npz", "test")[0]["x"]
    assert (found.dtype, found.shape) == (twin.dtype, twin.shape) == (array.dtype, shape)
    assert found.flags.writeable
    assert found.tobytes() == twin.tobytes()


def test_what_cannot_be_read_is_not_written(tmp_path):
    for array in (np.array(["text"]), np.zeros(2, "M8[s]"), np.zeros(2, "f8,i4")):
        with pytest.raises(ValueError, match="only numeric arrays"):
            save_arrays(tmp_path / "a.npz", {"x": array}, {"kind": "test"})


# JSON.


@pytest.mark.parametrize(
    "text",
    [
        *("NaN", "[Infinity]", "-Infinity", "1e999", "9" * 400, "[-" + "9" * 400 + "]", "[" * 65 + "]" * 65),
        *('{"a": 1, "a": 2}', "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, "\ufeff{}", "{} {}", ""),
    ],
)
def test_json_is_strict(text, tmp_path):
    with pytest.raises(ValueError):
        from_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json: not readable as a test"):
        read_json(tmp_path / "a.json", "a test")


def test_json_that_we_write_is_read():
    value = {
        "a": [1, -2.5, 10**30, None, True, "NaN", "λ"],
        "b": {"c": {"d": 1e308}},
        "deep": eval("[" * 60 + "]" * 60),
    }
    assert from_json(to_json(value)) == value


def within(seconds, call, *arguments):
    """Call in a thread, for what may wait for ever."""
    box = []

    def run():
        try:
            box.append(call(*arguments))
        except Exception as error:
            box.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert box, "no answer"
    return box[0]


@pytest.mark.parametrize("what", ["fifo", "/dev/zero", "folder", "loop"])
def test_text_files_that_are_no_files_are_refused(what, tmp_path):
    path = tmp_path / "a.json"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to(what if what != "loop" else path)
    assert isinstance(within(5, read_json, path, "a test"), FileNotFoundError)
    assert isinstance(within(5, read_record, path), FileNotFoundError)
    assert "not a regular file" in str(within(5, read_lines, path))


def test_other_text_is_refused_by_name(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe{\0")
    with pytest.raises(ValueError, match=r"a\.json: not UTF-8 text"):
        read_json(path, "a test")
    with open(path, "wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(ValueError, match="of at most"):
        read_json(path, "a test")


def test_lines_end_at_newlines_alone(tmp_path):
    (tmp_path / "a").write_text("one\u2028still\x0cone\nzwei\n")
    assert read_lines(tmp_path / "a") == ["one\u2028still\x0cone", "zwei"]


@pytest.mark.parametrize("line", ["{}", "[]", "7", '{"digest": [], "values": {}, "refused": {}}', "x", "[" * 5000])
def test_records_of_measures_are_checked(line, tmp_path):
    sound = {"digest": "a", "values": {"m": 1.5}, "refused": {"n": "no"}}
    path = tmp_path / "measured.jsonl"
    path.write_text(json.dumps(sound) + "\n")
    assert _measures.measured_records(path) == {"a": {"values": {"m": 1.5}, "refused": {"n": "no"}}}
    for change in ({"values": {"m": "1"}}, {"values": {"m": float("nan")}}, {"values": []}, {"refused": {"n": 1}}):
        path.write_text(json.dumps(sound | change) + "\n")
        with pytest.raises(ValueError, match="line 1 is no record"):
            _measures.measured_records(path)
    path.write_text(json.dumps(sound) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"measured\.jsonl: line 2 is no record of measures"):
        _measures.measured_records(path)


# Networks.


def changed_header(source, target, **changes):
    with zipfile.ZipFile(io.BytesIO(source)) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    raw = parts["__header__.npy"]
    header = json.loads(raw[10 + struct.unpack("<H", raw[8:10])[0] :]) | changes
    text = json.dumps(header).encode()
    parts["__header__.npy"] = npy("|u1", f"({len(text)},)", text)
    target.write_bytes(zipped(parts.items()))


@pytest.mark.parametrize(
    "net",
    ["mlp-100000-100000", "mlp" + "-1" * 20_000, "resnet" + "-1" * 3000, "vgg-8192-8192", "mlp-" + "9" * 30, 7, None],
)
def test_networks_that_a_file_only_states_are_not_made(net, readers, tmp_path):
    """Forty gigabytes were, and layers without end."""
    content = readers["trained network"].seeds[0].content
    recipe = {"data": "digits", "net": net, "epochs": 1}
    changed_header(content, tmp_path / "a.npz", recipe=recipe)
    start = time.process_time()
    with pytest.raises(ValueError, match="not a usable trained network") as caught:
        within_memory(load_checkpoint, tmp_path / "a.npz")
    assert time.process_time() - start < 0.5
    assert "alloc" not in str(caught.value)


def within_memory(call, *arguments):
    import resource

    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (files._status("VmSize") + files.MEMORY, old[1]))
    try:
        return call(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.mark.parametrize(
    "change",
    [
        *({"train_error": "nan"}, {"test_error": 1.5}, {"test_error": -0.1}, {"classes": True}, {"classes": 10.0}),
        *(
            {"input_shape": [1, 8.5, 8]},
            {"input_shape": [2**40] * 3},
            {"history": [{"loss": "x"}]},
            {"classes": 10**400},
        ),
        *(
            {"recipe": {"data": 7, "net": "mlp-6-5", "epochs": 1}},
            {"recipe": {"data": "x", "net": "mlp-6-5", "epochs": 1.5}},
        ),
        {"recipe": {"data": "x", "net": "mlp-6-5", "epochs": 1, "seed": 2**70}},
    ],
)
def test_trained_networks_have_what_they_promise(change, readers, tmp_path):
    changed_header(readers["trained network"].seeds[0].content, tmp_path / "a.npz", **change)
    with pytest.raises(ValueError, match=r"not a usable trained network|not a readable specprune trained network"):
        load_checkpoint(tmp_path / "a.npz")


def test_low_rank_layers_beyond_the_tensors_are_refused(readers, tmp_path):
    """Sixty thousand took minutes: every name was compared with every other; long chains went too deep."""
    content = readers["low-rank network"].seeds[0].content
    for low_rank in (
        {f"m{k}": 0 for k in range(60_000)},
        {".".join("0" * k): 0 for k in range(1, 400)},
        {"0." * 900: 0},
    ):
        changed_header(content, tmp_path / "a.npz", low_rank=low_rank)
        error = within(5, load_pruned, tmp_path / "a.npz", hostile_readers._wide)
        assert isinstance(error, ValueError)
        assert "low-rank layers for" in str(error)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"level": "x"}, "level 'x'"),
        ({"samples": -1}, "-1 samples"),
        ({"samples": 2.5}, "2.5 samples"),
        ({"rows": [5, 5, -5]}, "-5 rows"),
        ({"rows": [5, 5, 5.0]}, "5.0 rows"),
        ({"layers": ["0", "2", "2"]}, "twice"),
        ({"layers": ["0", "2"], "rows": [5, 5]}, "arrays of no layer"),
    ],
)
def test_moments_have_what_they_promise(change, match, readers, tmp_path):
    content = readers["moments"].seeds[0].content
    changed_header(content, tmp_path / "m.npz", **change)
    with pytest.raises(ValueError, match=f"a damaged moments file .*{match}"):
        Moments.load(tmp_path / "m.npz")
    arrays, header = load_arrays(save(tmp_path / "n.npz", content), "moments")
    for gram in (arrays["gram0"].astype(np.float32), np.full_like(arrays["gram0"], np.nan), -arrays["gram0"]):
        save_arrays(tmp_path / "n.npz", arrays | {"gram0": gram}, header)
        with pytest.raises(ValueError, match="a damaged moments file"):
            Moments.load(tmp_path / "n.npz")


def save(path, content):
    path.write_bytes(content)
    return path


def test_certify_states_are_checked(readers, tmp_path):
    reader = readers["certify state"]
    seed = reader.seeds[0]
    for name, content in {**seed.others, seed.file: seed.content}.items():
        save(tmp_path / name, content)
    assert reader.read(tmp_path / seed.file).latent is not None
    arrays, header = load_arrays(tmp_path / seed.file, "certify state")
    for other in (
        (arrays, header | {"round": 1.5}),
        (arrays, header | {"seconds": "x"}),
        (arrays, header | {"deadline": -1}),
        (arrays, header | {"history": [{}]}),
        (arrays, {key: value for key, value in header.items() if key != "epoch"}),
        ({k: v for k, v in arrays.items() if k != "first0"}, header),
        (arrays | {"weight0": arrays["weight0"][:1]}, header),
        (arrays | {"weight0": arrays["weight0"] * np.float32(np.nan)}, header),
    ):
        save_arrays(tmp_path / seed.file, *other)
        with pytest.raises(ValueError, match="a damaged state of a run"):
            reader.read(tmp_path / seed.file)
    save_arrays(tmp_path / seed.file, arrays, {key: value for key, value in header.items() if key != "identity"})
    with pytest.raises(ValueError, match="holds a run of None"):
        reader.read(tmp_path / seed.file)


# Zoos.


@pytest.fixture
def zoo(readers, tmp_path):
    seed = readers["zoo manifest"].seeds[0]
    place = tmp_path / "zoo"
    place.mkdir()
    for name, content in {**seed.others, seed.file: seed.content}.items():
        save(place / name, content)
    return place


@pytest.mark.parametrize("name", ["../thesis.doc", "{folder}/thesis.doc", "..", "zoo.json", "a\0b", "x" * 5000, ""])
def test_a_zoo_neither_reads_nor_renames_files_elsewhere(name, zoo):
    """`train_zoo` renamed any file that a manifest called a damaged shard."""
    precious = save(zoo.parent / "thesis.doc", b"years of work")
    manifest = json.loads((zoo / "zoo.json").read_text())
    manifest["shards"][name.format(folder=zoo.parent)] = []
    (zoo / "zoo.json").write_text(json.dumps(manifest))
    settings = zoo_grid(data="digits", family="mlp", width=5, depth=2, n=60, learning_rate=0.04, batch_size=32)
    for call in (lambda: load_zoo(zoo), lambda: train_zoo(load_dataset("digits"), settings, zoo, max_epochs=2)):
        with pytest.raises(ValueError, match="not a readable manifest of a zoo"):
            call()
    assert precious.read_bytes() == b"years of work"


@pytest.mark.parametrize(
    "change", [{"width": 30_000}, {"width": 2**31, "depth": 2**31}, {"depth": 10**6}, {"depth": 3}]
)
def test_networks_of_a_zoo_are_those_that_fit_into_its_file(change, zoo):
    shard = next(path for path in zoo.iterdir() if path.suffix == ".npz")
    arrays, header = load_arrays(shard, "zoo shard")
    networks = [record | {"setting": record["setting"] | change} for record in header["networks"]]
    save_arrays(shard, arrays, header | {"networks": networks})
    with pytest.raises(ValueError, match="holds other layers"):
        within_memory(load_zoo, zoo)


@pytest.mark.parametrize(
    "change",
    [
        *({"train_error": 2}, {"epochs": 1.5}, {"converged": 1}, {"test_loss": "x"}, {"test_error": None}),
        *({"setting": {}}, {"setting": None}),
    ],
)
def test_records_of_a_zoo_are_checked(change, zoo):
    shard = next(path for path in zoo.iterdir() if path.suffix == ".npz")
    arrays, header = load_arrays(shard, "zoo shard")
    save_arrays(shard, arrays, header | {"networks": [header["networks"][0] | change]})
    with pytest.raises(ValueError, match=r"a damaged header.*trains it again"):
        load_zoo(zoo)


def test_manifests_of_a_zoo_are_checked(zoo):
    manifest = json.loads((zoo / "zoo.json").read_text())
    for change in (
        *(
            {"shards": []},
            {"plan": {}},
            {"plan": manifest["plan"] | {"classes": 2**40}},
            {"settings": [{}]},
            {"plan": 7},
        ),
        *({"plan": manifest["plan"] | {"input_shape": [2**30] * 3}}, {"settings": 7}, {"shards": {"x": []}}),
    ):
        (zoo / "zoo.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match="not a readable manifest of a zoo"):
            load_zoo(zoo)


# Figures.


def test_figure_data_that_harm_are_refused(tmp_path):
    path = tmp_path / "a.json"
    record = {"figure": "eigenvalue_decay", "digest": "d", "data": {"x": [float(k) for k in range(600)]}}
    write_record(path, record)
    assert read_record(path) == record
    text = json.loads(path.read_text())
    for data in ([text["data"]["x"]] * 3000, {"npz": ["array_0"]}, {"npz": None}, eval("[" * 80 + "]" * 80)):
        path.write_text(json.dumps(text | {"data": data}))
        with pytest.raises(ValueError):
            read_record(path)
    path.write_text(json.dumps(text | {"figure": []}))
    with pytest.raises(ValueError, match="no name of a figure"):  # a list cannot be looked up
        redraw(path)
    path.write_text(json.dumps(text | {"figure": "eigenvalue_decay", "data": {"layers": 7}}))
    with pytest.raises(ValueError, match="not the data of the figure 'eigenvalue_decay'"):
        redraw(path)
    path.write_text(json.dumps(text))
    for array in (np.zeros((3, 3)), np.zeros(5_000_000, np.int64), np.array([np.nan]), np.zeros(600, np.uint8)):
        save_arrays(tmp_path / "a.npz", {"array_0": array}, {"kind": "figure data", "digest": "d"})
        with pytest.raises(ValueError, match=r"a\.npz"):
            read_record(path)


# Data sets.


def test_gzip_files_filled_up_with_zeros_are_refused(tmp_path):
    """Zeros behind a gzip file count as padding: 64 GB of them, on paper, were read to the end."""
    content = bytes([0, 0, 8, 1, 0, 0, 0, 9]) + bytes(9)
    path = save(tmp_path / "x.gz", gzip.compress(content))
    assert read_idx(path).shape == (9,)
    with open(path, "ab") as stream:
        stream.truncate(1 << 36)
    assert "found a file of 68719476736 bytes" in str(within(5, read_idx, path))
    assert "expected at most" in within(5, _find_fault, path, RemoteFile("x.gz", "0" * 64, len(content)))


@pytest.mark.parametrize("what", ["link", "fifo"])
def test_a_download_writes_into_no_link_and_waits_for_no_pipe(what, tmp_path):
    precious = save(tmp_path / "precious", b"years of work")
    folder = tmp_path / "mnist"
    folder.mkdir()
    part = folder / "train-images-idx3-ubyte.gz.part"
    part.symlink_to(precious) if what == "link" else os.mkfifo(part)
    found = within(5, download_dataset, "mnist", tmp_path, ["http://127.0.0.1:9/"], False)
    assert isinstance(found, ValueError)
    assert "is not a regular file" in str(found)
    assert precious.read_bytes() == b"years of work"


def test_lengths_that_a_server_makes_up_are_a_mirrors_fault(tmp_path, monkeypatch):
    """int() takes not all that str.isdigit() calls digits."""
    import urllib.request
    from email.message import Message

    for length in ("²", "9" * 5000):
        answer = io.BytesIO(b"content")
        answer.status, answer.headers = 200, Message()
        answer.headers["Content-Length"] = length
        monkeypatch.setattr(urllib.request, "urlopen", lambda *_, answer=answer, **__: answer)
        file = RemoteFile("x.gz", "0" * 64, 10)
        assert "gzip" in _try_mirror("http://x/x.gz", file, tmp_path / "x.gz.part", False)


def test_damaged_archives_raise_value_error(tmp_path):
    source = Source("tiny", (1, 1, 1), 2, 1, 1, "cifar", ("a.bin", "b.bin"), file_bytes=40)
    path = save(tmp_path / "x.tar.gz", attacks._tar(str(tmp_path / "marker")))
    for content in (b"", b"x", b"\x1f\x8b", gzip.compress(b"x" * 600), path.read_bytes()[:60]):
        save(path, content)
        with pytest.raises(ValueError, match=r"x\.tar\.gz"):
            _extract(path, source, tmp_path / "into")
    with tarfile.open(path, "w:gz") as archive:
        for name in ("../../a.bin", "/abs/b.bin"):
            info = tarfile.TarInfo(name)
            info.size = 40
            archive.addfile(info, io.BytesIO(bytes(40)))
    _extract(path, source, tmp_path / "into")
    assert sorted(p.name for p in (tmp_path / "into").iterdir()) == ["a.bin", "b.bin"]
    assert not (tmp_path.parent / "a.bin").exists()


# Code.


def own_network():
    return nn.Linear(3, 2)


def load_weights(path):
    return _problem._own_model("test_hostile_files:own_network", path)


@pytest.mark.parametrize("format_", ["zip", "old", "bare"])
def test_weights_run_no_code(format_, tmp_path):
    Bomb.marker = str(tmp_path / "unpickled")
    path = tmp_path / "w.pt"
    if format_ == "bare":
        path.write_bytes(pickled(str(tmp_path / "unpickled")))
    else:
        torch.save({"weight": Bomb(), "bias": torch.zeros(2)}, path, _use_new_zipfile_serialization=format_ == "zip")
    with pytest.raises(ValueError, match=r"expected a state_dict saved by torch\.save"):
        load_weights(path)
    assert not (tmp_path / "unpickled").exists()
    torch.save(own_network().state_dict(), path)
    assert isinstance(load_weights(path), nn.Linear)


def test_weights_claim_no_memory(tmp_path):
    """The format before PyTorch 1.6 says how much to read before it is there, and records can be packed."""
    path = tmp_path / "w.pt"
    torch.save(own_network().state_dict(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"not in the format of PyTorch 1\.6"):
        load_weights(path)
    torch.save(own_network().state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        parts = [(info.filename, archive.read(info)) for info in archive.infolist()]
    path.write_bytes(zipped(parts))
    with pytest.raises(ValueError, match="its records are packed"):
        load_weights(path)


def test_nothing_but_the_named_module_is_imported_from_the_current_folder(tmp_path, monkeypatch):
    """A module that the program needs later was looked for in the current folder first."""
    decoys = ("wave", "colorsys", "weights", "digits", "mlp")
    for decoy in decoys:
        (tmp_path / f"{decoy}.py").write_text(f"open('ran-{decoy}', 'w')\n")
        monkeypatch.delitem(sys.modules, decoy, raising=False)
    (tmp_path / "own_hostile.py").write_text(
        "import own_helper\nimport wave\ndef make():\n    import colorsys\n    return own_helper.net()\n"
    )
    (tmp_path / "own_helper.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(64, 10)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(tmp_path))])
    net = _problem._own_model("own_hostile:make", None)
    torch.save(net.state_dict(), "weights.pt")
    _problem._own_model("own_hostile:make", "weights.pt")
    assert sys.modules["own_hostile"].__file__ == str(tmp_path / "own_hostile.py")
    assert not list(tmp_path.glob("ran-*"))
    for name in ("own_hostile", "own_helper"):
        monkeypatch.delitem(sys.modules, name)


def test_names_in_files_do_not_command_the_terminal(readers, tmp_path, capsys):
    changed_header(readers["trained network"].seeds[0].content, tmp_path / "a.npz", kind="\x1b[2J\x1b]0;evil\x07")
    assert main(["spectra", "--weights", str(tmp_path / "a.npz"), "--out", str(tmp_path)]) == 1
    assert "\x1b" not in capsys.readouterr().err
    (tmp_path / "b\x1b[2J.npz").write_bytes(b"x")
    assert main(["spectra", "--weights", str(tmp_path / "b\x1b[2J.npz"), "--out", str(tmp_path)]) == 1
    assert "\x1b" not in capsys.readouterr().err


def test_our_own_files_are_still_read(tmp_path):
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    save_pruned(net, tmp_path / "a.npz")
    loaded = load_pruned(tmp_path / "a.npz", lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), loaded.state_dict().values(), strict=True))
