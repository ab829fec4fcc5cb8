"""Attacks that no random change would find: bombs, sizes that lie, names that lead elsewhere, and what is no file."""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from hostile_readers import Reader, Seed
from mutations import members, npy, npy_raw, pickled, zipped

_MEGABYTE = bytes(1 << 20)


@functools.cache
def _bomb(name: str, size: int, method: int, fill: bytes = b"\0", start: bytes = b"", end: bytes = b"") -> bytes:
    """Return a zip file with one large .npy member; made once, as packing it takes seconds."""
    payload = start + fill * (size // len(fill)) + end
    return zipped([(name, npy("|u1", f"({len(payload)},)", payload))], method)


def _joined(packed: bytes, parts) -> bytes:
    stream = io.BytesIO(packed)
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts:
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
    return stream.getvalue()


@functools.cache
def _packed(size: int, times: int = 1, start: bytes = b"") -> bytes:
    """Return zeros, compressed several times over."""
    data = start + bytes(size)
    for _ in range(times):
        data = gzip.compress(data, 9, mtime=0)
    return data


def prepare() -> None:
    """Make the bombs, once for all processes."""
    for method, size in _BOMBS.values():
        _bomb("extra.npy", size, method)
    for size, fill, start, end in _LARGE_HEADERS:
        _bomb("__header__.npy", size, zipfile.ZIP_DEFLATED, fill, start, end)
    _bomb("a0.npy", 40 << 20, zipfile.ZIP_DEFLATED)


_BOMBS = {"bzip2": (zipfile.ZIP_BZIP2, 300 << 20), "lzma": (zipfile.ZIP_LZMA, 300 << 20)}
_BOMBS["deflate"] = (zipfile.ZIP_DEFLATED, 60 << 20)
_LARGE_HEADERS = (
    (60_000_000, b"[],", b"[", b"[]]"),
    (30_000_000, b"x", b'{"kind": "', b'"}'),
    (30_000_000, b" ", b"{}", b""),
)


def _header(content: bytes) -> dict:
    raw = dict(members(content))["__header__.npy"]
    return json.loads(raw[10 + struct.unpack("<H", raw[8:10])[0] :])


def with_header(content: bytes, text: bytes | dict) -> bytes:
    """Return an .npz file of ours with another header."""
    raw = json.dumps(text).encode() if isinstance(text, dict) else text
    member = ("__header__.npy", npy("|u1", f"({len(raw)},)", raw))
    return zipped([member, *(part for part in members(content) if part[0] != "__header__.npy")])


def _overlapping(content: bytes, count: int = 200) -> bytes:
    """Return a zip file whose directory names one large array many times: each entry costs 50 bytes."""
    made = _joined(_bomb("a0.npy", 40 << 20, zipfile.ZIP_DEFLATED), members(content))
    start = struct.unpack("<I", made[made.rindex(b"PK\5\6") + 16 :][:4])[0]
    end = made.rindex(b"PK\5\6")
    entry = made[start : made.index(b"PK\1\2", start + 4)]
    more = b"".join(entry.replace(b"a0.npy", b"a%c.npy" % (k % 26 + 97)) for k in range(count))
    directory = made[start:end] + more
    total = len(members(content)) + 1 + count
    return made[:start] + directory + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, total, total, len(directory), start, 0)


def _npz_attacks(content: bytes, marker: str, large: bool) -> Iterator[tuple[str, bytes]]:
    parts = members(content)
    names = [name for name, _ in parts if name != "__header__.npy"]
    header = _header(content)

    def instead(data: bytes, method: int = zipfile.ZIP_DEFLATED, name: str | None = None) -> bytes:
        target = name or (names[0] if names else "extra.npy")
        return zipped([(target, data), *(part for part in parts if part[0] != target)], method)

    for shape in ("(1099511627776,)", "(34359738368,)", "(2147483648,)", "(268435456,)", "(4294967296, 4294967296)"):
        for dtype in ("<f8", "|u1"):
            for name in (None, "__header__.npy"):
                yield f"claims {shape} {dtype}", instead(npy(dtype, shape, b"abc"), name=name)
    for label, (method, size) in _BOMBS.items() if large else ():
        yield f"{label} bomb", _joined(_bomb("extra.npy", size, method), parts)
    if large:
        yield "overlapping entries", _overlapping(content)
    yield "nested archives", instead(content)
    yield "an archive in an archive as header", instead(content, name="__header__.npy")
    yield "1400 entries", zipped([*parts, *((f"x{k}.npy", b"") for k in range(700))], zipfile.ZIP_STORED)
    yield "pickled objects", instead(npy("|O", "(1,)", pickled(marker)))
    yield "pickled header", instead(npy("|O", "()", pickled(marker)), name="__header__.npy")
    yield "a pickle as a member", instead(pickled(marker))
    yield "a pickle for a file", pickled(marker)
    yield "an object array for a file", npy("|O", "(1,)", pickled(marker))
    yield "header twice", zipped([("__header__.npy", dict(parts)["__header__.npy"]), *parts])
    yield "array twice", zipped([*parts, *parts[-1:]])
    for name in ("../../evil.npy", "/tmp/evil.npy", "C:\\evil.npy", "..\\evil.npy", "evil\n.npy", "a" * 60000 + ".npy"):
        yield f"a member {name[:20]!r}", zipped([*parts, (name, npy("<f4", "(1,)", b"abcd"))])
    encrypted = bytearray(zipped(parts))
    encrypted[6] |= 1
    encrypted[encrypted.index(b"PK\1\2") + 8] |= 1
    yield "an encrypted member", bytes(encrypted)
    lzma = zipped(parts, zipfile.ZIP_LZMA)
    place = lzma.index(b"__header__.npy") + 14
    for junk in (b"\xff" * 12, b"\0" * 12, b"\x09\x04\xff\xff\x5d\0\0\xff\xff"):
        yield "damaged lzma", lzma[:place] + junk + lzma[place + len(junk) :]
    for text in (
        b"[" * 100_000 + b"]" * 100_000,
        b'{"kind":' * 50_000 + b"1" + b"}" * 50_000,
        b"9" * 1_000_000,
        b"\xef\xbb\xbf{}",
        json.dumps(header).encode("utf-16"),
        json.dumps(header).encode()[:-1] + b', "extra": ' + b"[" * 500 + b"]" * 500 + b"}",
        json.dumps(header).encode()[:-1] + b', "extra": NaN}',
        json.dumps(header).encode()[:-1] + b', "extra": 1e999}',
        json.dumps(header).encode()[:-1] + b', "kind": ' + json.dumps(header["kind"]).encode() + b"}",
        json.dumps(header).encode()[:-1] + b', "kind": "x"}',
    ):
        yield f"header {text[:12]!r}... of {len(text)} bytes", with_header(content, text)
    rest = [part for part in parts if part[0] != "__header__.npy"]
    for size, fill, start, end in _LARGE_HEADERS if large else ():
        bomb = _bomb("__header__.npy", size, zipfile.ZIP_DEFLATED, fill, start, end)
        yield f"header {start!r} and {size} bytes", _joined(bomb, rest)
    many = {f"m{k}": 0 for k in range(60_000 if large else 2000)}
    chain = {".".join(["0"] * k): 0 for k in range(1, 1500)}
    entry = {"type": "Linear", "sizes": {"in_features": 1}}
    if "low_rank" in header:
        yield "60000 low-rank layers", with_header(content, header | {"low_rank": many})
        yield "a chain of low-rank layers", with_header(content, header | {"low_rank": chain})
        yield "60000 modules", with_header(content, header | {"structure": dict.fromkeys(many, entry)})
        both = header | {"structure": dict.fromkeys(many, entry), "low_rank": many}
        yield "60000 modules and low-rank layers", with_header(content, both)
        inside = {f"0.{name}": 0 for name in many} | {"0": 0}
        yield "60000 low-rank layers inside", with_header(content, header | {"low_rank": inside})
        for name in ("", ".", "0.", "..", "0.0.0", "training", "__class__", "weight"):
            yield f"a low-rank layer {name!r}", with_header(content, header | {"low_rank": {name: 0}})
            yield f"a module {name!r}", with_header(content, header | {"structure": {name: entry}})
    if "recipe" in header:
        for net in (
            *("mlp-100000-100000", "mlp-30000-30000", "resnet-4096", "vgg-8192-8192", "vgg16", "resnet56", "mlp-0"),
            *(
                "mlp-" + "9" * 30,
                "mlp" + "-1" * 20_000,
                "mlp" + "-1" * 400,
                "resnet" + "-1" * 3000,
                "mlp-" + "9" * 5000,
            ),
            *("vgg" + "-1" * 5000, "mlp-²", "mlp-1\n", ""),
        ):
            yield f"a network {net[:20]}", with_header(content, header | {"recipe": header["recipe"] | {"net": net}})
        for shape in (
            [1, 100_000, 100_000],
            [10**9, 10**9, 10**9],
            [-1, 8, 8],
            [1.0, 8, 8],
            ["1", "8", "8"],
            [1, 64, 1],
        ):
            yield f"images {shape}", with_header(content, header | {"input_shape": shape})
        for classes in (10**12, 10**30, -1, True, 10.0, "10", 1 << 26):
            yield f"classes {classes}", with_header(content, header | {"classes": classes})
    if "networks" in header:
        for change in ({"width": 2**31, "depth": 2**31}, {"width": 30_000}, {"depth": 10**6}, {"depth": 10**9}):
            records = [r | {"setting": r["setting"] | change} for r in header["networks"]]
            yield f"settings {change}", with_header(content, header | {"networks": records})
    if "layers" in header:
        yield "many layers", with_header(content, header | {"layers": ["x"] * 100_000, "rows": [1] * 100_000})


def _zoo_attacks(content: bytes) -> Iterator[tuple[str, bytes]]:
    manifest = json.loads(content)
    shard = next(iter(manifest["shards"]))
    for name in (
        "../zoo/" + shard,
        "/etc/passwd",
        "../../x",
        ".",
        "",
        "a\0b",
        "x" * 5000,
        "zoo.json",
        shard + "/",
        "/dev/zero",
    ):
        shards = {**manifest["shards"], name: [0]}
        yield f"a shard {name[:20]!r}", json.dumps(manifest | {"shards": shards}).encode()
    for change in ({"width": 2**31, "depth": 2**31}, {"width": 10**5}, {"depth": 10**7}, {"seed": -1}, {"n": 0}):
        settings = [setting | change for setting in manifest["settings"]]
        yield f"settings {change}", json.dumps(manifest | {"settings": settings}).encode()
    for change in ({"classes": 10**12}, {"input_shape": [10**9] * 3}, {"classes": -1}, {"target_loss": "x"}):
        yield f"plan {change}", json.dumps(manifest | {"plan": manifest["plan"] | change}).encode()


def _json_attacks(content: bytes) -> Iterator[tuple[str, bytes]]:
    for depth in (100, 400, 480, 900, 1100, 30_000):
        yield f"depth {depth}", b"[" * depth + b"]" * depth
        yield f"objects of depth {depth}", b'{"data":' * depth + b"1" + b"}" * depth
    body = content.rstrip()
    if body.endswith(b"}") and b"\n{" not in body:
        for extra in (b"NaN", b"-Infinity", b"1e999", b"9" * 4299, b"9" * 9999, b'"\\ud800"', b"[" * 400 + b"]" * 400):
            yield f"extra {extra[:12]!r}", body[:-1] + b', "extra": ' + extra + b"}"
    if b'"npz"' in content:
        record = json.loads(content)
        reference = {"npz": "array_0"}
        for data in ([reference] * 3000, {"npz": ["array_0"]}, {"npz": 1}, {"npz": None}, [reference, [reference]]):
            yield f"references {str(data)[:20]}", json.dumps(record | {"data": data}).encode()
        for figure in ([], {}, None, "x", 1, ["eigenvalue_decay"], "../x"):
            yield f"figure {figure!r}", json.dumps(record | {"figure": figure}).encode()


def _gzip_attacks(large: bool) -> Iterator[tuple[str, bytes]]:
    for count in (1, 3000) if large else ():
        yield f"{count} empty members", gzip.compress(b"") * count
    yield "a long name", b"\x1f\x8b\x08\x08" + bytes(6) + b"x" * 60_000
    yield "a long extra field", b"\x1f\x8b\x08\x04" + bytes(6) + b"\xff\xff" + b"x" * 60_000
    if not large:
        return
    yield "gzip bomb", _packed(60 << 20)
    claims = bytes([0, 0, 8, 3]) + (60_000_000).to_bytes(4, "big") + (1).to_bytes(4, "big") * 2
    yield "idx bomb", _packed(60_000_000, 1, claims)
    yield "idx bomb that claims less", _packed(60 << 20, 1, bytes([0, 0, 8, 1, 0, 0, 0, 9]))
    yield "nested gzip", _packed(60 << 20, 3)


def _idx_attacks() -> Iterator[tuple[str, bytes]]:
    for count in (0, 1, 2**31 - 1, 2**31, 2**32 - 1):
        for dimensions in (0, 1, 2, 3, 4, 5, 255):
            claims = bytes([0, 0, 8, dimensions]) + count.to_bytes(4, "big") * dimensions
            yield f"{dimensions} dimensions of {count}", claims + b"x"
            yield f"0 of {dimensions} dimensions of {count}", claims[:4] + bytes(4) + claims[8:]


def contents(reader: Reader, seed: Seed, marker: str, cuts: int | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield the attacks on one sound file of a reader by name.

    A file of up to 2000 bytes is cut off at every byte, a larger one at 1000 places; `cuts` asks for fewer, and for no
    bombs that take seconds to make.
    """
    content = seed.content
    rng = random.Random(len(content))
    yield "empty", b""
    for junk in (
        b"\0",
        b"\n",
        b"PK",
        b"PK\3\4" + bytes(60),
        b"PK\5\6" + bytes(18),
        b"\x1f\x8b",
        b"\xef\xbb\xbf",
        b"null",
    ):
        yield f"only {junk[:8]!r}", junk
    most = cuts or (2000 if len(content) <= 2000 else 1000 if reader.seconds <= 1 else 5)
    step = max(1, len(content) // most)
    for size in range(0, len(content), step):
        yield f"truncated to {size}", content[:size]
    yield "zeros", bytes(len(content))
    yield "noise", rng.randbytes(len(content))
    yield "twice", content + content
    yield "followed by junk", content + b"junk"
    yield "1 MB longer", content + _MEGABYTE
    yield "a pickle", pickled(marker)
    yield "a tar file", _tar(marker)
    if seed.file.endswith(".npz"):
        yield from _npz_attacks(content, marker, large=cuts is None)
    if seed.file == "zoo.json":
        yield from _zoo_attacks(content)
    if seed.file.endswith((".json", ".jsonl")):
        yield from _json_attacks(content)
    if seed.file.endswith((".gz", ".part")):
        yield from _gzip_attacks(large=cuts is None)
    if "idx" in seed.file:
        for name, data in _idx_attacks():
            yield name, gzip.compress(data, mtime=0) if seed.file.endswith(".gz") else data
    if seed.file.endswith(".pt"):
        yield from _state_dict_attacks(content, marker)
    if seed.file.endswith(".spnw"):
        for filling in (b"\0", b"\x55", b"\xff"):
            for size in (1, 100, 60_000, 65_536):
                word = content[8:12] + filling * size
                yield f"a word filled with {filling!r}", b"spnw" + zlib.crc32(word).to_bytes(4, "big") + word


def _tar(marker: str) -> bytes:
    import tarfile

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as archive:
        for name, kind, target in (
            ("../../a.bin", tarfile.REGTYPE, ""),
            ("/tmp/evil/b.bin", tarfile.REGTYPE, ""),
            ("tiny/a.bin", tarfile.SYMTYPE, "/etc/passwd"),
            ("tiny/b.bin", tarfile.LNKTYPE, "/etc/passwd"),
            ("a.bin", tarfile.CHRTYPE, ""),
            ("b.bin", tarfile.FIFOTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            info.size = 40 if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(bytes(40)) if info.size else None)
    return stream.getvalue()


def _state_dict_attacks(content: bytes, marker: str) -> Iterator[tuple[str, bytes]]:
    parts = members(content) if content.startswith(b"PK") else ()
    for calls in (
        b"cos\nsystem\n(S'touch %s'\ntR." % marker.encode(),
        b"cposix\nsystem\n(S'touch %s'\ntR." % marker.encode(),
        b'c__builtin__\neval\n(S\'open("%s", "w")\'\ntR.' % marker.encode(),
        b"c__builtin__\nbytearray\n(L100000000000L\ntR.",
        b"c__builtin__\nset\n(c__builtin__\nbytearray\n(L1000000000L\ntRtR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(NI0\n(I1\nt(I1\ntI0\nNtR.",
        b"ctorch\nhub.load\n(S'x'\ntR.",
        b"(lp0\n" + b"(lp1\n" * 5000 + b".",
        b"(" * 60_000 + b".",
        b"\x80\x02}q\x00.",
        b"\x80\x02]q\x00h\x00h\x00\x86.",
        b"I1\n.",
        b"N.",
    ):
        yield f"the pickle {calls[:24]!r}", calls
        if parts:
            yield (
                f"in a zip {calls[:24]!r}",
                zipped(
                    [(name, calls if name.endswith("data.pkl") else data) for name, data in parts], zipfile.ZIP_STORED
                ),
            )
    if parts:
        yield "a TorchScript archive", zipped([*parts, (parts[0][0].split("/")[0] + "/constants.pkl", b"N.")], 0)
        yield "deflated records", zipped([(n, bytes(20 << 20) if n.endswith("/data/0") else d) for n, d in parts])


def places(reader: Reader, seed: Seed, folder: Path) -> Iterator[tuple[str, Path]]:
    """Put things that are no regular file where a reader looks, and return where; `folder` has the files beside it."""
    path = folder / seed.file

    def clear() -> None:
        if path.is_symlink() or path.is_file() or path.is_fifo():
            path.unlink()
        elif path.is_dir():
            path.rmdir()

    for label, make in (
        ("nothing", lambda: None),
        ("a folder", path.mkdir),
        ("a FIFO", lambda: os.mkfifo(path)),
        ("a link to /dev/zero", lambda: path.symlink_to("/dev/zero")),
        ("a link to /dev/urandom", lambda: path.symlink_to("/dev/urandom")),
        ("a link to /dev/null", lambda: path.symlink_to("/dev/null")),
        ("a link to itself", lambda: path.symlink_to(path)),
        ("a link to nothing", lambda: path.symlink_to(folder / "absent")),
        ("a link to /proc/self/mem", lambda: path.symlink_to("/proc/self/mem")),
        ("a link to a folder", lambda: path.symlink_to("/etc")),
    ):
        clear()
        make()
        yield label, path
    clear()
    path.write_bytes(npy_raw(b"", b""))
    yield "an empty .npy", path
    with open(path, "wb") as stream:
        stream.write(seed.content)
        stream.truncate(1 << 36)
    yield "a sparse file of 64 GB", path
    clear()
