"""Let atheris choose the changes of one reader's files, by which lines of the package they reach; optional."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from files import MEMORY, Tally, _status, _trial, _Watch
from hostile_readers import Reader

INSTRUMENTED = ("_files", "_records", "_measures", "_problem")
INSTRUMENTED += ("testbed.datasets", "testbed.download", "testbed.training", "testbed.zoo_files")
INSTRUMENTED += ("testbed.zoo_store", "testbed.zoo")
INSTRUMENTED += ("compress.checkpoint", "compress.low_rank_checkpoint", "compress.moments", "compress.language")
INSTRUMENTED += ("compress.range_coder", "compress.vocabulary", "analysis.certificate", "analysis.certify")
INSTRUMENTED += ("figures.data_files", "figures.setting")


def instrument() -> None:
    """Prepare the functions of the reading modules, in place, to tell which branches they take."""
    import importlib
    import types

    import atheris

    for name in INSTRUMENTED:
        module = importlib.import_module(f"specprune.{name}")
        for value in list(vars(module).values()):
            if isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
                atheris.instrument_func(value)


def fuzz(reader: Reader, arguments: list[str], folder: Path) -> int:
    """Feed a reader until a failure or until libFuzzer's limits, such as -runs=20000, are met.

    Args:
        reader: the reader.
        arguments: libFuzzer's own.
        folder: for files.
    """
    import atheris

    instrument()
    sound, marker = reader.seeds[0], folder / "unpickled"
    for name, content in {**sound.others, sound.file: sound.content}.items():
        (folder / name).write_bytes(content)
    reader.check(reader.read(folder / sound.file))
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(reader.seeds):
        (corpus / str(number)).write_bytes(seed.content)
    tally, watch = Tally(reader.name), _Watch()
    watch.writer = True  # libFuzzer's corpus is in files, too
    before, start = _status("VmRSS"), time.perf_counter()

    def change(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        try:
            return sound.mutate(data, rng)[:most]
        except Exception:  # a changed file may be none that can be taken apart
            return sound.mutate(sound.content, rng)[:most]

    def one(data: bytes) -> None:
        (folder / sound.file).write_bytes(data)
        _trial(reader, folder / sound.file, f"input {tally.tried}", tally, watch)
        grown = _status("VmRSS") - before
        if tally.tried % 5000 == 0:
            rate = tally.tried / (time.perf_counter() - start)
            print(f"{tally.tried} tried, {tally.refused} refused, {tally.accepted} accepted, {rate:.0f} a second")
        if tally.failures or marker.exists() or grown > MEMORY:
            raise RuntimeError(f"{tally.reasons} {grown >> 20} MB")

    limits = ["-max_len=70000", f"-rss_limit_mb={(before + 4 * MEMORY) >> 20}", "-seed=1", "-detect_leaks=0"]
    atheris.Setup([sys.argv[0], *limits, *arguments, str(corpus)], one, custom_mutator=change)
    atheris.Fuzz()
    return 0
