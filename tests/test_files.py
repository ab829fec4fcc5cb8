"""Files that are whole or absent, and arrays without pickle."""

import errno
import multiprocessing
import os
import stat
import time
from pathlib import Path

import numpy as np
import pytest

from specprune._files import (
    _machine,
    append_line,
    atomic_write,
    load_arrays,
    lock_folder,
    read_lines,
    save_arrays,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "deep" / "er" / "a.txt"
    write_text(path, "one λ\n")
    assert path.read_bytes() == "one λ\n".encode()
    with atomic_write(path) as stream:
        stream.write(b"two")
        stream.flush()
        assert path.read_bytes() == "one λ\n".encode()  # readers see the old file until the end
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["a.txt"]


def test_the_usual_permissions_are_given(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("exists", [True, False])
def test_an_error_while_writing_leaves_what_was_there(tmp_path, error, exists):
    path = tmp_path / "a.txt"
    if exists:
        path.write_text("old")

    def write():
        with atomic_write(path) as stream:
            stream.write(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == (["a.txt"] if exists else [])
    assert not exists or path.read_text() == "old"


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_failing_disk_leaves_what_was_there(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert names(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


ARRAYS = {
    "matrix": np.arange(6.0).reshape(2, 3),
    "scalar": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 4), dtype=np.float32),
    "flags": np.array([True, False]),
    "special": np.array([np.nan, np.inf, -0.0]),
    "tensor:a.b": np.array([1], dtype=np.int16),
}
HEADER = {"kind": "test", "list": [1, 2.5, "λ"], "inner": {"x": None, "y": True}}


def test_arrays_and_header_come_back(tmp_path):
    save_arrays(tmp_path / "a.npz", ARRAYS, HEADER)
    arrays, header = load_arrays(tmp_path / "a.npz", "test")
    assert header == HEADER
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)
    assert np.signbit(arrays["special"][2])


def test_the_kind_is_checked(tmp_path):
    save_arrays(tmp_path / "a.npz", ARRAYS, HEADER)
    with pytest.raises(ValueError, match=r"a\.npz: holds 'test', expected a specprune other file"):
        load_arrays(tmp_path / "a.npz", "other")
    save_arrays(tmp_path / "b.npz", {}, {"no": "kind"})
    with pytest.raises(ValueError, match="holds None, expected a specprune test file"):
        load_arrays(tmp_path / "b.npz", "test")


def test_objects_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="array 'bad' holds Python objects"):
        save_arrays(tmp_path / "a.npz", {"bad": np.array([{}], dtype=object)}, HEADER)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "header", [b"", b"{", b"\xff\xfe", b"[1, 2]", b"null"], ids=["empty", "cut", "bytes", "list", "null"]
)
def test_headers_that_are_none_are_refused(tmp_path, header):
    np.savez(tmp_path / "a.npz", __header__=np.frombuffer(header, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"a\.npz: (not a readable|holds None)"):
        load_arrays(tmp_path / "a.npz", "test")


def test_files_of_other_programs_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"b\.npz: no such file \(expected a specprune test file\)"):
        load_arrays(tmp_path / "b.npz", "test")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_arrays(tmp_path, "test")
    for content in (b"", b"P", b"PK\x03\x04", b"PK\x03\x04" + bytes(100), b"text", b"\x93NUMPY" + bytes(50)):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz: not a readable specprune test file"):
            load_arrays(tmp_path / "a.npz", "test")


def test_every_truncation_and_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "a.npz"
    save_arrays(path, {"numbers": np.arange(50.0)}, HEADER)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="not a readable"):
            load_arrays(path, "test")
    refused = 0
    for k in range(len(content)):
        for bit in (0, 3, 6):
            path.write_bytes(content[:k] + bytes([content[k] ^ (1 << bit)]) + content[k + 1 :])
            try:
                arrays, header = load_arrays(path, "test")
            except ValueError:
                refused += 1
            else:  # bytes that carry nothing, such as time stamps, or the length of the zip file's directory
                assert header == HEADER
                assert set(arrays) <= {"numbers"}
                assert all(np.array_equal(array, np.arange(50.0)) for array in arrays.values())
    assert refused > len(content)


def test_lines_are_whole_after_a_kill(tmp_path):
    path = tmp_path / "made" / "lines.jsonl"
    assert read_lines(path) == []
    append_line(path, "one")
    append_line(path, "zwei ä")
    assert read_lines(path) == ["one", "zwei ä"]
    content = path.read_bytes()
    for cut in range(len(content)):  # a kill in the middle of any write
        path.write_bytes(content[:cut])
        whole = content[:cut].decode(errors="ignore").split("\n")[:-1]
        assert read_lines(path) == whole
        append_line(path, "three")
        assert read_lines(path) == [*whole, "three"]


def test_a_folder_takes_one_run_at_a_time(tmp_path):
    folder = tmp_path / "new"
    with lock_folder(folder):
        refused = pytest.raises(ValueError, match="another run is at work in this folder; wait for it, or give another")
        with refused, lock_folder(folder):
            pytest.fail("two runs in one folder")
        with lock_folder(tmp_path):  # a folder above it is another folder
            pass
    with pytest.raises(RuntimeError), lock_folder(folder):
        raise RuntimeError("a run that fails")
    with lock_folder(folder):
        pass
    assert names(folder) == []


def hold(folder, locked):
    with lock_folder(folder), atomic_write(Path(folder) / "mine.json"):
        locked.set()
        time.sleep(60)


def test_a_killed_run_leaves_no_lock_and_its_half_written_files_are_removed(tmp_path):
    context = multiprocessing.get_context("forkserver")
    locked = context.Event()
    child = context.Process(target=hold, args=(str(tmp_path), locked))
    child.start()
    assert locked.wait(30)
    with pytest.raises(ValueError, match="another run"), lock_folder(tmp_path):
        pytest.fail("two runs in one folder")
    write_text(tmp_path / "mine.json", "{}")  # by another process, while the first still writes
    (half,) = (name for name in names(tmp_path) if name != "mine.json")
    assert half.startswith(".mine.json.")
    child.kill()
    child.join()
    (tmp_path / ".mine.json.elsewhere-1-abc.part").touch()
    half = tmp_path / half
    copy = half.with_name(half.name.replace("mine", "other"))
    copy.touch()
    write_text(tmp_path / "mine.json", "{}")  # removes what was left of this file
    assert names(tmp_path) == [".mine.json.elsewhere-1-abc.part", copy.name, "mine.json"]
    with lock_folder(tmp_path):  # removes what was left of any
        assert names(tmp_path) == [".mine.json.elsewhere-1-abc.part", "mine.json"]


def test_leftovers_that_may_not_be_removed_do_not_stop_a_write(tmp_path, monkeypatch):
    process = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(0,))
    process.start()
    process.join()
    left = tmp_path / f".mine.json.{_machine()}-{process.pid}-abc.part"
    left.touch()

    def refuse(path, **_):
        raise PermissionError(errno.EPERM, "not yours", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        write_text(tmp_path / "mine.json", "{}")
    assert names(tmp_path) == [left.name, "mine.json"]
    elsewhere = left.with_name(left.name.replace(_machine(), f"{_machine()}9"))  # another container's: it may live
    elsewhere.touch()
    write_text(tmp_path / "mine.json", "{}")
    assert names(tmp_path) == [elsewhere.name, "mine.json"]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(handle, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with lock_folder(tmp_path):
        pass
    assert "cannot lock it" in caplog.text
