"""The range coder: what is written is read, words form a prefix code, and lengths are ideal up to two bits."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune.compress.range_coder import AdaptiveBit, Decoder, Encoder, adaptive_bits, choice_bits

FREQUENCIES = st.lists(st.integers(1, 1000), min_size=1, max_size=12).map(tuple)


@st.composite
def messages(draw):
    """Choices among alternatives, mixed with adaptive bits in one of two contexts."""
    steps = []
    for _ in range(draw(st.integers(0, 60))):
        if draw(st.booleans()):
            frequencies = draw(FREQUENCIES)
            steps.append((frequencies, draw(st.integers(0, len(frequencies) - 1))))
        else:
            steps.append((draw(st.integers(0, 1)), draw(st.integers(0, 1))))
    return steps


def write(steps):
    encoder, contexts = Encoder(), [AdaptiveBit(), AdaptiveBit()]
    for what, value in steps:
        if isinstance(what, tuple):
            encoder.choice(value, what)
        else:
            encoder.bit(value, contexts[what])
    return encoder.finish()


def read(data, steps):
    decoder, contexts = Decoder(data), [AdaptiveBit(), AdaptiveBit()]
    return [
        decoder.choice(what) if isinstance(what, tuple) else decoder.bit(contexts[what]) for what, _ in steps
    ], decoder


def share(steps):
    """The exact share of the unit interval that a message gets: a slow twin in fractions."""
    contexts, total = [[1, 1], [1, 1]], Fraction(1)
    for what, value in steps:
        if isinstance(what, tuple):
            total *= Fraction(what[value], sum(what))
        else:
            counts = contexts[what]
            total *= Fraction(counts[value], sum(counts))
            counts[value] += 2
    return total


def digits(word, length):
    return "".join(f"{byte:08b}" for byte in word)[:length]


@given(messages(), st.binary(max_size=12))
@settings(max_examples=100)
def test_what_is_written_is_read_whatever_follows(steps, rest):
    word, length = write(steps)
    assert len(word) == (length + 7) // 8
    assert int(digits(word, 8 * len(word))[length:] or "0", 2) == 0  # filled up with zeros
    found, decoder = read(word, steps)
    assert found == [value for _, value in steps]
    assert not decoder.exhausted
    assert read(word + rest, steps)[0] == found
    if length % 8:  # the word's last byte may be filled up with anything
        free = (1 << (8 - length % 8)) - 1
        assert read(word[:-1] + bytes([word[-1] | free]), steps)[0] == found


@given(messages())
@settings(max_examples=100)
def test_length_is_ideal_up_to_two_bits(steps):
    _, length = write(steps)
    exact = share(steps)
    ideal = math.log2(exact.denominator) - math.log2(exact.numerator)
    assert ideal - 1e-6 <= length < ideal + 2 + 1e-6


def test_a_certain_message_has_no_digits():
    assert write([]) == (b"", 0)
    assert write([((7,), 0)] * 100) == (b"", 0)


@pytest.mark.parametrize("alphabet", [(1, 1), (1, 2, 3), (250, 1, 5), (1,) * 7])
def test_words_are_prefix_free_and_obey_kraft(alphabet):
    """All messages of four choices and two adaptive bits."""
    found = {}
    for values in itertools.product(range(len(alphabet)), repeat=4):
        for bits in itertools.product((0, 1), repeat=2):
            message = digits(*write([(alphabet, value) for value in values] + [(0, bit) for bit in bits]))
            assert found.setdefault(message, (values, bits)) == (values, bits)
    assert sum(Fraction(1, 2 ** len(word)) for word in found) <= 1
    ordered = sorted(found)
    assert not any(after.startswith(before) for before, after in itertools.pairwise(ordered))


def test_carries_run_through_whole_words():
    """A message at the very end of its interval and then past its middle: the digits 0111... become 1000..."""
    for count in range(1, 40):
        steps = [((1, 1), 0)] + [((1, 1), 1)] * (8 * count) + [((1, 2**20), 1)] * 3 + [((3, 5, 1), 1)] * 5
        word, _ = write(steps)
        assert read(word, steps)[0] == [value for _, value in steps]


def test_long_messages_lose_nothing():
    generator = np.random.default_rng(0)
    bits = (generator.random(100_000) < 0.03).astype(int).tolist()
    steps = [(0, bit) for bit in bits]
    word, length = write(steps)
    ones = sum(bits)
    assert read(word, steps)[0] == bits
    assert 0 <= length - float(adaptive_bits(len(bits) - ones, ones)) < 2


@given(st.lists(st.integers(0, 1), max_size=300))
@settings(max_examples=60)
def test_adaptive_bits_depend_on_counts_alone(bits):
    exact = share([(0, bit) for bit in bits])
    ideal = math.log2(exact.denominator) - math.log2(exact.numerator)
    assert float(adaptive_bits(bits.count(0), bits.count(1))) == pytest.approx(ideal, abs=1e-8)


def test_adaptive_bits_by_hand():
    assert adaptive_bits([0, 1, 0, 1, 2], [0, 0, 1, 1, 0]) == pytest.approx(
        [0, 1, 1, 3, math.log2(8 / 3)], abs=1e-12
    )  # 1/2 * 1/4, 1/2 * 3/4
    assert choice_bits(1, (3, 1)) == 2


def test_length_is_that_of_constriction():
    """The library rounds to whole words of 32 bits and its probabilities to 24 bits."""
    constriction = pytest.importorskip("constriction")
    generator = np.random.default_rng(1)
    bits = (generator.random(20_000) < 0.2).astype(np.int32)
    ones = np.concatenate([[0], np.cumsum(bits)[:-1]])
    probabilities = (ones + 0.5) / (np.arange(len(bits)) + 1)
    theirs = constriction.stream.queue.RangeEncoder()
    theirs.encode(bits, constriction.stream.model.Bernoulli(perfect=False), probabilities)
    _, ours = write([(0, bit) for bit in bits.tolist()])
    assert -2 <= theirs.num_bits() - ours <= 64


def test_the_decoder_tells_when_nothing_is_left():
    steps = [((1,) * 256, value) for value in range(1, 100)]
    word, _ = write(steps)
    found, decoder = read(word[:40], steps)
    assert found[:40] == [value for _, value in steps][:40]
    assert decoder.exhausted


@pytest.mark.parametrize("frequencies", [(), (0, 1), (-1, 3), (2**24, 1)])
def test_bad_frequencies(frequencies):
    for call in (
        lambda: Encoder().choice(0, frequencies),
        lambda: Decoder(b"").choice(frequencies),
        lambda: choice_bits(0, frequencies),
    ):
        with pytest.raises(ValueError, match="expected positive whole numbers"):
            call()


def test_bad_choice():
    with pytest.raises(ValueError, match="choice 2 of 2 alternatives"):
        Encoder().choice(2, (1, 1))
    with pytest.raises(ValueError, match="choice -1 of 2"):
        Encoder().choice(-1, (1, 1))
