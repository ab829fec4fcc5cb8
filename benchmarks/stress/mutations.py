"""Hostile changes to files: of bytes, of JSON, and inside zip and gzip files with all checksums made right again."""

from __future__ import annotations

import contextlib
import copy
import functools
import gzip
import io
import json
import pickle
import random
import struct
import zipfile
import zlib

_COUNTS = (0, 1, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
_VALUES = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**53 + 1, -(2**63), 2**64, 10**30, 0.5, -0.5, 1e-320, 1e308, 3.7),
    *("", "x", "nan", "inf", "NaN", "../../etc/passwd", "/etc/passwd", "a\0b", "..", "x" * 5000, "λ\u2028\x1b[2J", "O"),
    *([], {}, [[]], [1, 2, 3], {"kind": "x"}, [[1], [1, 2]], {"npz": "array_0"}),
)
# Text that no parser gives back as it was: what JSON forbids, and what only some programs accept.
_TOKENS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 4000, "9" * 5000, "1e-999", "[" * 20, "01", "'a'")
_DEEP = tuple("[" * depth + "]" * depth for depth in (90, 300, 700, 960, 3000, 100_000))
_NAMES = ("../../evil", "/tmp/evil", "..", "", "a" * 300, "__header__", "weights0", "evil\n", "array_1", "tensor:x")
_DTYPES = (
    *("|O", "<f4", "<f8", ">f8", "<f2", "<c16", "<i8", "<i4", "<u8", "|b1", "|u1", "|S9", "<U3", "<U99999999", "|V0"),
    *("<M8[ns]", "<m8", "|S0", "<f16", "garbage", "O8", "|i1", "(2,)f8"),
)
_SHAPES = ("()", "(0,)", "(1,)", "(-1,)", "(2147483647,)", "(4294967296, 4294967296)", "(1099511627776,)")
_SHAPES += ("(0, 9223372036854775807)", "(9223372036854775808,)", "(1e3,)", "(True,)", "None", "(1, 2, 3)", "[2, 3]")
_SHAPES += ("(" + "1, " * 40 + ")", "(0," * 5 + ")", "(((1,),),)", "(3)", "(16777216,)", "(134217728,)")
_HEADERS = (
    b"",
    b"{",
    b"{'descr': [",
    b"(" * 4000,
    b"-" * 9000,
    b"[" * 9990,
    b"{'descr': '<f8'}",
    b"  x\n y",
    b"L" * 500,
)
_HEADERS += (b"{'descr': '''", b"{1L: 2L,\n", b"\xff" * 64, b"9" * 9000, b"1" + b"+1" * 4000, b"{" + b"'a':" * 900)


class Bomb:
    """What unpickling would call: it leaves a file behind."""

    marker = "unpickled"

    def __reduce__(self):
        return open, (self.marker, "w")


@functools.cache
def pickled(marker: str) -> bytes:
    Bomb.marker = marker
    return pickle.dumps(Bomb())


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return a file with one to four local changes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = len(data)
        place = rng.randrange(size + 1)
        kind = rng.randrange(9)
        if kind == 0:
            del data[place:]
        elif kind == 1:
            data[place:place] = rng.randbytes(rng.choice((1, 2, 4, 16, 300)))
        elif kind == 2:
            del data[place : place + rng.choice((1, 2, 4, 16, 300))]
        elif kind == 3:
            data[place : place + 8] = rng.choice(_COUNTS).to_bytes(8, rng.choice(("little", "big")))
        elif kind == 4:
            data[place : place + 4] = (rng.choice(_COUNTS) % 2**32).to_bytes(4, rng.choice(("little", "big")))
        elif kind == 5 and size:
            start = rng.randrange(size)
            data[place:place] = data[start : start + rng.choice((4, 50, 1000))]
        elif kind == 6 and size:
            data[min(place, size - 1)] = rng.choice((0, 1, 127, 128, 255))
        elif kind == 7:
            data += bytes(rng.choice((1, 8, 512, 5000)))
        elif size:
            data[min(place, size - 1)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _spots(value, found=None):
    """Return (container, key) of every node of a JSON tree but its root."""
    found = [] if found is None else found
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found.append((value, key))
        _spots(item, found)
    return found


def mutate_json(text: bytes, rng: random.Random) -> bytes:
    """Return JSON with a few nodes exchanged, lost, doubled or made into what JSON forbids."""
    if rng.random() < 0.12:
        return mutate_bytes(text, rng)
    if rng.random() < 0.04:
        extra = (
            b"\xef\xbb\xbf" + text,
            text.decode().encode("utf-16"),
            text + text,
            b"[" + text + b"]",
            b"\xff" + text,
        )
        return rng.choice(extra)
    tree = json.loads(text)
    token = None
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        spots = _spots(tree)
        if not spots:
            break
        owner, key = rng.choice(spots)
        kind = rng.randrange(10)
        if kind == 0 and isinstance(owner, dict):
            owner[rng.choice(("extra", "kind", "../x", key + key, "npz"))] = owner[key]
        elif kind == 1:
            del owner[key]
        elif kind == 2 and isinstance(owner, list):
            owner.insert(key, owner[key])
        elif kind == 3:
            token = rng.choice((*_TOKENS, *_TOKENS, *_DEEP))
            owner[key] = "@token@"
        elif kind == 4 and isinstance(owner, dict):
            token = f"{json.dumps(owner[key])}, {json.dumps(key)}: {rng.choice(('0', json.dumps(owner[key])))}"
            owner[key] = "@token@"
        elif kind == 5:
            other, name = rng.choice(spots)
            with contextlib.suppress(IndexError, KeyError):
                owner[key] = json.loads(json.dumps(other[name]))
        elif kind == 6 and type(owner[key]) in (int, float):
            owner[key] = rng.choice(
                (-owner[key], owner[key] + 1, owner[key] * 10**9, float(owner[key]), str(owner[key]))
            )
        else:
            owner[key] = copy.deepcopy(rng.choice(_VALUES))
    out = json.dumps(tree)
    return (out.replace('"@token@"', token) if token is not None else out).encode("utf-8", "replace")


def mutate_lines(text: bytes, rng: random.Random) -> bytes:
    """Return JSON lines with one line changed."""
    lines = text.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = mutate_json(lines[place], rng)
    return b"\n".join(lines) + b"\n"


def npy(descr: str, shape: str, payload: bytes, version: int = 1, order: str = "False") -> bytes:
    """Return an .npy file that says what it is told to."""
    quoted = descr if descr.startswith("[") else repr(descr)
    return npy_raw(f"{{'descr': {quoted}, 'fortran_order': {order}, 'shape': {shape}, }}".encode(), payload, version)


def npy_raw(header: bytes, payload: bytes, version: int = 1, length: int | None = None) -> bytes:
    size = len(header) + 1 if length is None else length
    packed = struct.pack("<H", size % 2**16) if version == 1 else struct.pack("<I", size % 2**32)
    return b"\x93NUMPY" + bytes([version % 256, 0]) + packed + header + b"\n" + payload


def _mutate_npy(content: bytes, rng: random.Random, marker: str) -> bytes:
    length = struct.unpack("<H", content[8:10])[0]
    header, payload = content[10 : 10 + length - 1], content[10 + length :]
    kind = rng.randrange(8)
    if kind == 0:
        return npy_raw(header, mutate_bytes(payload, rng))
    if kind == 1:
        return npy(rng.choice(_DTYPES), rng.choice(_SHAPES), payload, rng.choice((1, 1, 2, 3)))
    if kind == 2:
        return npy("<f4", rng.choice(_SHAPES), payload)
    if kind == 3:
        return npy_raw(rng.choice(_HEADERS), payload, rng.choice((1, 2, 3, 9)))
    if kind == 4:
        return npy_raw(header, payload, rng.choice((1, 2, 3)), rng.choice(_COUNTS))
    if kind == 5:
        return npy(rng.choice(("|O", "[('a', '|O')]")), rng.choice(("()", "(1,)", "(2,)")), pickled(marker))
    if kind == 6:
        descr = rng.choice(("[('a', '<f4')]", "[('', '<f4')]", "[('a', '<f4', (1000000000,))]", "[]", "[('a', '|V0')]"))
        return npy(descr, rng.choice(_SHAPES), payload)
    text = header.decode("latin-1")
    return npy_raw(rng.choice((text.replace("False", "True"), text.replace("<", ">"), text * 2)).encode(), payload)


@functools.lru_cache(maxsize=64)
def members(content: bytes) -> tuple[tuple[str, bytes], ...]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return tuple((info.filename, archive.read(info)) for info in archive.infolist())


def zipped(parts, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip file of (name, content) pairs, doubled names and all."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive._didModify = True
        for name, content in parts:
            info = zipfile.ZipInfo(name or "x", (1980, 1, 1, 0, 0, 0))
            info.filename, info.compress_type = name, method
            archive.writestr(info, content)
    return stream.getvalue()


def _lie_in_directory(content: bytes, rng: random.Random) -> bytes:
    """Change one field of a random entry of a zip file's directory, or of its end."""
    data = bytearray(content)
    places = [k for k in range(len(data)) if data.startswith((b"PK\1\2", b"PK\5\6", b"PK\3\4"), k)]
    place = rng.choice(places)
    offset, width = rng.choice(((6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 4), (24, 4), (28, 2), (42, 4)))
    if data.startswith(b"PK\5\6", place):
        offset, width = rng.choice(((8, 2), (10, 2), (12, 4), (16, 4), (20, 2)))
    value = rng.choice(_COUNTS) % 256**width
    data[place + offset : place + offset + width] = value.to_bytes(width, "little")
    return bytes(data)


def mutate_npz(content: bytes, rng: random.Random, marker: str = "unpickled") -> bytes:
    """Return one of our .npz files, changed: mostly in its header's JSON, else in an array, a name, or the zip."""
    kind = rng.random()
    if kind < 0.15:
        return mutate_bytes(content, rng)
    if kind < 0.22:
        return _lie_in_directory(content, rng)
    parts = [list(part) for part in members(content)]
    place = rng.randrange(len(parts))
    if kind < 0.62:
        place = next(k for k, (name, _) in enumerate(parts) if name == "__header__.npy")
        old = parts[place][1]
        text = mutate_json(old[10 + struct.unpack("<H", old[8:10])[0] :], rng)
        parts[place][1] = npy("|u1", f"({len(text)},)", text)
    elif kind < 0.85:
        parts[place][1] = _mutate_npy(parts[place][1], rng, marker)
    elif kind < 0.88:
        del parts[place]
    elif kind < 0.91:
        parts.insert(rng.randrange(len(parts) + 1), list(rng.choice(parts)))
    elif kind < 0.94:
        parts[place][0] = rng.choice(_NAMES) + rng.choice((".npy", ""))
    elif kind < 0.97:
        parts.append([rng.choice(_NAMES) + rng.choice((".npy", "")), rng.choice(parts)[1]])
    method = rng.choice((zipfile.ZIP_STORED,) * 5 + (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    made = zipped(parts, method)
    return mutate_bytes(made, rng) if rng.random() < 0.05 else made


def mutate_gzip(content: bytes, rng: random.Random) -> bytes:
    """Return a gzip file, changed outside or inside."""
    if rng.random() < 0.4:
        return mutate_bytes(content, rng)
    inner = mutate_bytes(gzip.decompress(content), rng)
    packed = gzip.compress(inner, 1, mtime=0)
    return packed if rng.random() < 0.8 else packed + rng.choice((packed, b"\0" * 99, b"rest", gzip.compress(b"")))


def mutate_state_dict(content: bytes, rng: random.Random, marker: str = "unpickled") -> bytes:
    """Return a file of torch.save, changed: mostly in its pickle."""
    if rng.random() < 0.25:
        return mutate_bytes(content, rng)
    if rng.random() < 0.1:
        return _lie_in_directory(content, rng)
    if rng.random() < 0.1:
        return rng.choice((pickled(marker), b"\x80\x02" + pickled(marker), mutate_bytes(pickled(marker), rng)))
    parts = [list(part) for part in members(content)]
    place = rng.randrange(len(parts))
    if rng.random() < 0.7:
        place = next(k for k, (name, _) in enumerate(parts) if name.endswith("data.pkl"))
    parts[place][1] = mutate_bytes(parts[place][1], rng)
    if rng.random() < 0.05:
        parts[place][1] = pickled(marker)
    return zipped(parts, zipfile.ZIP_STORED)


def mutate_word(content: bytes, rng: random.Random) -> bytes:
    """Return a file of a network of the language, changed; mostly with its checksum made right again."""
    if rng.random() < 0.2:
        return mutate_bytes(content, rng)
    word = mutate_bytes(content[8:], rng) if rng.random() < 0.7 else b"\1" + rng.randbytes(rng.choice((3, 20, 200)))
    return content[:4] + zlib.crc32(word).to_bytes(4, "big") + word
