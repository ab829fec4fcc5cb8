"""Downloads from small servers on this machine: resuming, checking, choosing among mirrors."""

import contextlib
import dataclasses
import gzip
import hashlib
import http.server
import io
import struct
import tarfile
import threading

import numpy as np
import pytest

from specprune.testbed import CATALOG, download_dataset, load_dataset
from specprune.testbed.catalog import RemoteFile


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; knows ranges, and breaks off, where the server says so."""

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append((self.path, asked))
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start + server.shift}-{len(content) - 1}/{len(content)}")
        if server.lengths:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content[start : start + server.most])

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Return a function that starts a server of the given files and returns it, with its address as `base`."""
    running = []

    def start(files, ranges=True, most=10**9, lengths=True):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.files = {f"/data/{name}": content for name, content in files.items()}
        server.ranges, server.most, server.lengths, server.shift, server.requests = ranges, most, lengths, 0, []
        server.base = f"http://127.0.0.1:{server.server_address[1]}/data/"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("SPECPRUNE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def idx_bytes(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def contents(monkeypatch):
    """Make "mnist" a set of 30 training and 5 test images of random pixels; return its files, gzipped, by name."""
    generator = np.random.default_rng(0)
    plain = {}
    for part, count in (("train", 30), ("t10k", 5)):
        images = generator.integers(256, size=(count, 28, 28)).astype(np.uint8)
        plain[f"{part}-images-idx3-ubyte.gz"] = idx_bytes(images)
        plain[f"{part}-labels-idx1-ubyte.gz"] = idx_bytes(np.arange(count, dtype=np.uint8) % 10)
    downloads = tuple(RemoteFile(name, hashlib.sha256(data).hexdigest(), len(data)) for name, data in plain.items())
    tiny = dataclasses.replace(CATALOG["mnist"], train_size=30, test_size=5, downloads=downloads, mirrors=())
    monkeypatch.setitem(CATALOG, "mnist", tiny)
    return {name: gzip.compress(data, mtime=0) for name, data in plain.items()}


IMAGES = "train-images-idx3-ubyte.gz"


def asked_for(server, name):
    return [asked for path, asked in server.requests if path == f"/data/{name}"]


def test_download_then_load_from_the_cache(serve, contents, tmp_path, capfd):
    server = serve(contents)
    folder = download_dataset("mnist", mirrors=[server.base])
    assert folder == tmp_path / "cache" / "specprune" / "mnist"
    assert sorted(path.name for path in folder.iterdir()) == sorted(contents)
    assert load_dataset("mnist").train_inputs.shape == (30, 1, 28, 28)
    assert capfd.readouterr() == ("", "")  # progress bars are silent in pipes


def test_the_catalog_gives_the_mirrors(serve, contents, tmp_path, monkeypatch):
    server = serve(contents)
    monkeypatch.setitem(CATALOG, "mnist", dataclasses.replace(CATALOG["mnist"], mirrors=(server.base.rstrip("/"),)))
    assert download_dataset("mnist", tmp_path / "mine", progress=False) == tmp_path / "mine" / "mnist"
    assert load_dataset("mnist", tmp_path / "mine").test_targets.tolist() == [0, 1, 2, 3, 4]


def test_right_files_are_kept_and_wrong_ones_replaced(serve, contents, tmp_path):
    server = serve(contents)
    folder = download_dataset("mnist", tmp_path, mirrors=[server.base])
    server.requests.clear()
    download_dataset("mnist", tmp_path, mirrors=[server.base])
    assert server.requests == []
    (folder / IMAGES).write_bytes(contents[IMAGES][:-3])
    download_dataset("mnist", tmp_path, mirrors=[server.base])
    assert [path for path, _ in server.requests] == [f"/data/{IMAGES}"]
    assert (folder / IMAGES).read_bytes() == contents[IMAGES]


def test_plain_files_count_too(serve, contents, tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name, data in contents.items():
        (folder / name.removesuffix(".gz")).write_bytes(gzip.decompress(data))
    server = serve(contents)
    download_dataset("mnist", tmp_path, mirrors=[server.base])
    assert server.requests == []
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte.*remove it"):
        download_dataset("mnist", tmp_path, mirrors=[server.base])


def test_a_part_is_resumed(serve, contents, tmp_path):
    part = tmp_path / "mnist" / f"{IMAGES}.part"
    part.parent.mkdir()
    part.write_bytes(contents[IMAGES][:5000])
    server = serve(contents)
    download_dataset("mnist", tmp_path, mirrors=[server.base])
    assert asked_for(server, IMAGES) == ["bytes=5000-"]
    assert not part.exists()
    assert (tmp_path / "mnist" / IMAGES).read_bytes() == contents[IMAGES]


def test_a_server_without_ranges_starts_over(serve, contents, tmp_path):
    part = tmp_path / "mnist" / f"{IMAGES}.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 5000)
    server = serve(contents, ranges=False)
    download_dataset("mnist", tmp_path, mirrors=[server.base])
    assert asked_for(server, IMAGES) == ["bytes=5000-"]
    assert (tmp_path / "mnist" / IMAGES).read_bytes() == contents[IMAGES]


def test_a_server_that_gives_another_range_is_passed_over(serve, contents, tmp_path):
    part = tmp_path / "mnist" / f"{IMAGES}.part"
    part.parent.mkdir()
    part.write_bytes(contents[IMAGES][:5000])
    confused, good = serve(contents), serve(contents)
    confused.shift = 7
    download_dataset("mnist", tmp_path, mirrors=[confused.base, good.base])
    assert asked_for(good, IMAGES) == ["bytes=5000-"]


@pytest.mark.parametrize("length", [5000, 10**6])
def test_a_part_of_another_file_is_thrown_away(serve, contents, tmp_path, length):
    part = tmp_path / "mnist" / f"{IMAGES}.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * length)
    server = serve(contents)
    download_dataset("mnist", tmp_path, mirrors=[server.base])
    assert asked_for(server, IMAGES) == [f"bytes={length}-", None]
    assert (tmp_path / "mnist" / IMAGES).read_bytes() == contents[IMAGES]


def test_a_complete_part_needs_no_request(serve, contents, tmp_path):
    part = tmp_path / "mnist" / f"{IMAGES}.part"
    part.parent.mkdir()
    part.write_bytes(contents[IMAGES])
    server = serve(contents)
    download_dataset("mnist", tmp_path, mirrors=[server.base])
    assert asked_for(server, IMAGES) == []
    assert (tmp_path / "mnist" / IMAGES).is_file()


def test_an_interrupted_transfer_goes_on(serve, contents, tmp_path):
    server = serve(contents, most=10_000)  # the images take some 23000 bytes
    download_dataset("mnist", tmp_path, mirrors=[server.base])
    assert asked_for(server, IMAGES) == [None, "bytes=10000-", "bytes=20000-"]
    assert (tmp_path / "mnist" / IMAGES).read_bytes() == contents[IMAGES]


def test_what_was_interrupted_for_good_is_kept_for_the_next_call(serve, contents, tmp_path):
    slow = serve(contents, most=4000)
    with pytest.raises(ConnectionError, match=r"broke off after 12000 of 2\d{4} bytes"):
        download_dataset("mnist", tmp_path, mirrors=[slow.base])
    assert [path.name for path in (tmp_path / "mnist").iterdir()] == [f"{IMAGES}.part"]
    server = serve(contents)
    download_dataset("mnist", tmp_path, mirrors=[server.base])
    assert asked_for(server, IMAGES) == ["bytes=12000-"]


def test_a_cut_transfer_of_unstated_length_is_noticed(serve, contents, tmp_path):
    server = serve(contents, most=4000, lengths=False)
    with pytest.raises(ConnectionError, match="damaged or truncated gzip"):
        download_dataset("mnist", tmp_path, mirrors=[server.base])
    assert list((tmp_path / "mnist").iterdir()) == []


def test_the_second_mirror_steps_in(serve, contents, tmp_path):
    # The first mirror breaks off within the images and has nothing else; the second compresses differently, so that
    # the first one's bytes must not be mixed with its own.
    first = serve({IMAGES: contents[IMAGES]}, most=4000)
    other = {name: gzip.compress(gzip.decompress(data), 0) for name, data in contents.items()}
    second = serve(other)
    download_dataset("mnist", tmp_path, mirrors=[first.base, second.base])
    assert asked_for(second, IMAGES) == ["bytes=12000-", None]
    assert (tmp_path / "mnist" / IMAGES).read_bytes() == other[IMAGES]
    assert load_dataset("mnist", tmp_path).train_targets.tolist() == [k % 10 for k in range(30)]


def test_a_wrong_checksum_is_never_accepted(serve, contents, tmp_path):
    pixels = bytearray(gzip.decompress(contents[IMAGES]))
    pixels[100] ^= 1
    server = serve(contents | {IMAGES: gzip.compress(bytes(pixels))})
    with pytest.raises(ConnectionError, match="expected SHA-256"):
        download_dataset("mnist", tmp_path, mirrors=[server.base])
    assert list((tmp_path / "mnist").iterdir()) == []


@pytest.mark.parametrize("lengths", [True, False])
def test_a_server_cannot_send_without_end(serve, contents, tmp_path, lengths, monkeypatch):
    monkeypatch.setattr("specprune.testbed.download._CHUNK", 1000)
    server = serve(contents | {IMAGES: bytes(3_000_000)}, lengths=lengths)
    with pytest.raises(ConnectionError, match=r"offers 3000000 bytes|sends more than"):
        download_dataset("mnist", tmp_path, mirrors=[server.base])
    sizes = [path.stat().st_size for path in (tmp_path / "mnist").iterdir()]
    assert sizes == ([] if lengths else [0])  # an honest length is refused before anything is written


def test_content_longer_than_published_is_not_unpacked(serve, contents, tmp_path, monkeypatch):
    server = serve(contents | {IMAGES: gzip.compress(bytes(50_000_000))})
    taken = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: taken.append(size) or read(self, size))
    with pytest.raises(ConnectionError, match="bytes of content, found more"):
        download_dataset("mnist", tmp_path, mirrors=[server.base])
    assert min(taken) >= 0
    assert max(taken) <= 16 + 30 * 784 + 1


def test_every_mirror_failing_gives_every_reason(serve, contents, tmp_path):
    empty = serve({})
    wrong = serve({IMAGES: b"a login page"})
    gone = serve({})
    gone.shutdown()
    gone.server_close()
    with pytest.raises(ConnectionError) as caught:
        download_dataset("mnist", tmp_path, mirrors=[empty.base, wrong.base, gone.base])
    message = str(caught.value)
    for server, reason in ((empty, "404"), (wrong, "gzip"), (gone, "refused")):
        line = next(line for line in message.splitlines() if server.base in line)
        assert reason in line


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs no download"):
        download_dataset("digits", tmp_path)
    with pytest.raises(ValueError, match=r"'imagenet'.*known are digits"):
        download_dataset("imagenet", tmp_path)
    for mirrors in ([], ["file:///etc/"], ["ftp://example.org/"]):
        with pytest.raises(ValueError, match="http:// or https://"):
            download_dataset("mnist", tmp_path, mirrors=mirrors)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def cifar(monkeypatch):
    """Make "cifar10" six files of two records; return a function that packs, registers and returns an archive."""

    def make(members):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        content = packed.getvalue()
        remote = RemoteFile("cifar-10-binary.tar.gz", hashlib.sha256(content).hexdigest(), len(content), archive=True)
        tiny = dataclasses.replace(
            CATALOG["cifar10"], train_size=10, test_size=2, file_bytes=2 * 3073, downloads=(remote,), mirrors=()
        )
        monkeypatch.setitem(CATALOG, "cifar10", tiny)
        return {remote.name: content}

    return make


RECORDS = {name: bytes([k]) + bytes(3072) + b"\x09" + b"\xff" * 3072 for k, name in enumerate(CATALOG["cifar10"].files)}


def test_cifar_archive_gives_its_six_files_only(serve, cifar, tmp_path):
    members = {f"../../cifar-10-batches-bin/{name}": data for name, data in RECORDS.items()}
    server = serve(cifar(members | {"../escaped.txt": b"x", "/readme.html": b"x"}))
    folder = download_dataset("cifar10", tmp_path / "here", mirrors=[server.base])
    assert sorted(path.name for path in folder.iterdir()) == sorted(RECORDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]
    assert load_dataset("cifar10", tmp_path / "here").train_targets.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    server.requests.clear()
    download_dataset("cifar10", tmp_path / "here", mirrors=[server.base])
    assert server.requests == []
    (folder / "test_batch.bin").write_bytes(b"cut")
    download_dataset("cifar10", tmp_path / "here", mirrors=[server.base])
    assert (folder / "test_batch.bin").read_bytes() == RECORDS["test_batch.bin"]


def test_cifar_archives_that_lack_a_file_are_refused(serve, cifar, tmp_path):
    members = dict(RECORDS)
    del members["data_batch_4.bin"]
    server = serve(cifar(members))
    with pytest.raises(ValueError, match=r"lacks data_batch_4\.bin"):
        download_dataset("cifar10", tmp_path, mirrors=[server.base])
    server = serve(cifar(RECORDS | {"data_batch_2.bin": b"short"}))
    with pytest.raises(ValueError, match=r"data_batch_2\.bin has 5 bytes, expected 6146"):
        download_dataset("cifar10", tmp_path, mirrors=[server.base])
    assert {path.stat().st_size for path in (tmp_path / "cifar10").glob("*.bin")} == {6146}


def test_the_catalog_states_the_published_sizes():
    sizes = [file.size for file in CATALOG["mnist"].downloads]
    assert sizes == [47040016, 60008, 7840016, 10008]
    assert CATALOG["cifar10"].file_bytes * 6 == (50000 + 10000) * 3073
    hashes = [file.sha256 for source in CATALOG.values() for file in source.downloads]
    assert len(set(hashes)) == 9
    assert all(len(digest) == 64 and int(digest, 16) for digest in hashes)
