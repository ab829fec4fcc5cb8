"""Selection rules against naive twins, exhaustive search and what the mathematics says must hold."""

import itertools

import numpy as np
import pytest
from helpers import random_covariance
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from specprune.bounds.degrees_of_freedom import leverage_scores
from specprune.bounds.nodes import WeightedNodes
from specprune.compress import NodeStatistics, greedy_nodes, information_losses, select_nodes, selection
from specprune.compress.selection import RULES, leverage_nodes, pivoted_cholesky_nodes


def problem(size, seed=0, rank=None, outputs=5):
    """A covariance, a consumer's Gram matrix, and unequal regularisers."""
    generator = np.random.default_rng(seed + 1000)
    covariance = random_covariance(size, seed, rank)
    weights = generator.standard_normal((outputs, size))
    tau = np.trace(covariance) / size * generator.uniform(1e-3, 1e-1, size)
    return covariance, weights.T @ weights, tau


def loss_of(covariance, gram, nodes, tau, theta):
    """The combined information loss from its definition, by a dense solve."""
    nodes = list(nodes)
    residual = covariance
    if nodes:
        block = covariance[np.ix_(nodes, nodes)] + np.diag(np.broadcast_to(tau, len(covariance))[nodes])
        residual = covariance - covariance[:, nodes] @ np.linalg.solve(block, covariance[nodes])
    inputs = np.trace(residual) / np.trace(covariance)
    outputs = np.trace(gram @ residual) / np.trace(gram @ covariance)
    return theta * inputs + (1 - theta) * outputs


def naive_greedy(covariance, gram, size, tau, theta):
    chosen = []
    for _ in range(size):
        left = [j for j in range(len(covariance)) if j not in chosen]
        chosen.append(min(left, key=lambda j: loss_of(covariance, gram, [*chosen, j], tau, theta)))
    return chosen


def naive_pivots(covariance, size):
    residual, chosen = covariance.copy(), []
    for _ in range(size):
        p = int(np.argmax(np.where(np.isin(np.arange(len(residual)), chosen), -np.inf, np.diag(residual))))
        chosen.append(p)
        residual = residual - np.outer(residual[p], residual[p]) / residual[p, p]
    return chosen


@pytest.mark.parametrize("theta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("block", [1, 4, 128])
def test_greedy_picks_what_the_definition_picks(monkeypatch, theta, block):
    monkeypatch.setattr(selection, "BLOCK", block)
    for seed in range(4):
        covariance, gram, tau = problem(14, seed, outputs=20)
        found = greedy_nodes(covariance, gram, 13, tau=tau, theta=theta)
        assert found.tolist() == naive_greedy(covariance, gram, 13, tau, theta)


def residual_greedy(covariance, gram, size, tau, theta):
    """A twin for many nodes: the gains from their formula, on a residual that is computed anew each time."""
    metric = theta / np.trace(covariance) * np.eye(len(covariance)) + (1 - theta) / np.sum(covariance * gram) * gram
    chosen = []
    for _ in range(size):
        residual = covariance
        if chosen:
            block = covariance[np.ix_(chosen, chosen)] + np.diag(tau[chosen])
            residual = covariance - covariance[:, chosen] @ np.linalg.solve(block, covariance[chosen])
        gains = np.sum((metric @ residual) * residual, 0) / (np.diag(residual) + tau)
        gains[chosen] = -np.inf
        chosen.append(int(np.argmax(gains)))
    return chosen


@pytest.mark.parametrize("theta", [0.0, 0.3, 1.0])
def test_greedy_on_more_nodes_than_a_block(theta):
    covariance, gram, tau = problem(300, 5, outputs=40)
    assert selection.BLOCK < 140
    found = greedy_nodes(covariance, gram, 140, tau=tau, theta=theta)
    assert found.tolist() == residual_greedy(covariance, gram, 140, tau, theta)


def test_greedy_without_a_regulariser():
    covariance, gram, _ = problem(10, 2, outputs=12)
    found = greedy_nodes(covariance, gram, 9, tau=0.0, theta=0.3)
    assert found.tolist() == naive_greedy(covariance, gram, 9, 0.0, 0.3)


@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
def test_greedy_against_every_subset(theta):
    gaps = []
    for seed in range(6):
        covariance, gram, tau = problem(8, seed)
        order = greedy_nodes(covariance, gram, 8, tau=tau, theta=theta)
        for size in range(1, 9):
            losses = {
                nodes: loss_of(covariance, gram, nodes, tau, theta) for nodes in itertools.combinations(range(8), size)
            }
            best = min(losses.values())
            found = losses[tuple(sorted(order[:size].tolist()))]
            assert found >= best
            if size in (1, 8):
                assert found == best
            assert found <= np.median(list(losses.values()))
            gaps.append(found - best)
    assert np.mean(gaps) < 0.02


@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_greedy_beats_chance(theta):
    generator = np.random.default_rng(0)
    covariance, gram, tau = problem(60, 3)
    greedy = loss_of(covariance, gram, greedy_nodes(covariance, gram, 15, tau=tau, theta=theta), tau, theta)
    random = [loss_of(covariance, gram, generator.permutation(60)[:15], tau, theta) for _ in range(50)]
    assert greedy < min(random)


def test_all_nodes_are_picked_once():
    covariance, gram, tau = problem(30, 1)
    assert sorted(greedy_nodes(covariance, gram, 30, tau=tau, theta=0.5)) == list(range(30))


@pytest.mark.parametrize("block", [3, 128])
def test_dead_and_doubled_nodes_come_last(monkeypatch, block):
    monkeypatch.setattr(selection, "BLOCK", block)
    living = random_covariance(6, 4)
    copies = np.array([0, 1, 2, 3, 4, 5, 0, 3])  # the last two double others
    mix = np.zeros((10, 6))
    mix[:8] = np.eye(6)[copies]  # nodes 8 and 9 are dead
    order = np.random.default_rng(0).permutation(10)
    covariance = (mix @ living @ mix.T)[np.ix_(order, order)]
    gram = problem(10, 0, outputs=12)[1]
    for theta in (0.0, 1.0):
        found = greedy_nodes(covariance, gram, 10, tau=0.0, theta=theta)
        origin = order[found]
        assert sorted(found) == list(range(10))
        assert len({copies[j] for j in origin[:6]}) == 6
        # A regulariser makes a second copy worth a little; dead nodes stay worthless.
        found = greedy_nodes(covariance, gram, 10, tau=1e-3, theta=theta)
        assert set(order[found[8:]]) == {8, 9}
    assert sorted(greedy_nodes(np.zeros((5, 5)), np.eye(5), 5, tau=0.0, theta=0.5)) == list(range(5))


seeds = st.integers(0, 10_000)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, theta=st.sampled_from([0.0, 0.4, 1.0]), size=st.integers(1, 12))
def test_the_order_of_the_nodes_does_not_matter(seed, theta, size):
    covariance, gram, tau = problem(12, seed)
    order = np.random.default_rng(seed).permutation(12)
    rows = np.ix_(order, order)
    plain = greedy_nodes(covariance, gram, size, tau=tau, theta=theta)
    moved = greedy_nodes(covariance[rows], gram[rows], size, tau=tau[order], theta=theta)
    assert order[moved].tolist() == plain.tolist()


@settings(max_examples=30, deadline=None)
@given(
    seed=seeds, theta=st.sampled_from([0.0, 0.4, 1.0]), units=st.floats(1e-6, 1e6), consumer_units=st.floats(1e-6, 1e6)
)
def test_units_do_not_matter(seed, theta, units, consumer_units):
    covariance, gram, tau = problem(12, seed)
    plain = greedy_nodes(covariance, gram, 8, tau=tau, theta=theta)
    scaled = greedy_nodes(covariance * units, gram * consumer_units, 8, tau=tau * units, theta=theta)
    assert scaled.tolist() == plain.tolist()
    magnitudes = np.random.default_rng(seed).uniform(size=12)
    lam = 1e-3 * np.trace(covariance)
    for rule in RULES:
        picks = [
            select_nodes(
                rule,
                NodeStatistics(covariance * a, gram * b, magnitudes * a),
                8,
                lam=lam * a,
                theta=theta,
                generator=np.random.default_rng(seed),
            ).tolist()
            for a, b in ((1.0, 1.0), (units, consumer_units))
        ]
        assert picks[0] == picks[1], rule


def test_smaller_choices_are_the_beginnings_of_larger_ones():
    covariance, gram, tau = problem(20, 7)
    order = greedy_nodes(covariance, gram, 20, tau=tau, theta=0.2)
    for size in range(1, 20):
        assert greedy_nodes(covariance, gram, size, tau=tau, theta=0.2).tolist() == order[:size].tolist()


def test_bad_arguments_of_the_greedy_rule():
    covariance, gram, tau = problem(5)
    for size in (0, 6, -1):
        with pytest.raises(ValueError, match=f"size={size}: there are 5 nodes"):
            greedy_nodes(covariance, gram, size, tau=tau, theta=0.5)
    for theta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"theta={theta}: expected a number between 0"):
            greedy_nodes(covariance, gram, 2, tau=tau, theta=theta)
    for bad in (-1e-9, float("nan"), float("inf"), np.array([1, 1, 1, 1, -1.0])):
        with pytest.raises(ValueError, match="tau must be finite and not negative"):
            greedy_nodes(covariance, gram, 2, tau=bad, theta=0.5)


# Information losses


def ridge_loss(rows, weights, nodes, omega, lam):
    """sum over targets of min_a mean (target - a phi_J)^2 + lam sum a_j^2 / omega_j, by least squares on the data."""
    n = len(rows)
    system = np.vstack([rows[:, nodes] / np.sqrt(n), np.diag(np.sqrt(lam / omega))])
    total = 0.0
    for target in (rows @ weights.T).T:
        values = np.concatenate([target / np.sqrt(n), np.zeros(len(nodes))])
        solution = np.linalg.lstsq(system, values, rcond=None)[0]
        total += float(np.sum((values - system @ solution) ** 2))
    return total


@pytest.mark.parametrize("seed", range(3))
def test_losses_are_what_ridge_regression_leaves(seed):
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((40, 7)) @ generator.standard_normal((7, 7))
    weights = generator.standard_normal((3, 7))
    covariance = rows.T @ rows / 40
    statistics = NodeStatistics(covariance, weights.T @ weights, np.ones(7))
    nodes, omega = np.array([5, 0, 3]), np.array([0.5, 2.0, 1.3])
    lam = 0.05
    found = information_losses(statistics, WeightedNodes(nodes, omega), lam)
    inputs = ridge_loss(rows, np.eye(7), nodes, omega, lam) / np.trace(covariance)
    outputs = ridge_loss(rows, weights, nodes, omega, lam) / np.mean(np.sum((rows @ weights.T) ** 2, 1))
    np.testing.assert_allclose(found, (inputs, outputs), rtol=1e-10)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, lam=st.floats(1e-6, 1.0))
def test_more_nodes_tell_more(seed, lam):
    covariance, gram, _ = problem(10, seed)
    generator = np.random.default_rng(seed)
    omega, order = generator.uniform(0.5, 2.0, 10), generator.permutation(10)
    statistics = NodeStatistics(covariance, gram, np.ones(10))
    losses = np.array(
        [information_losses(statistics, WeightedNodes(order[:size], omega[order[:size]]), lam) for size in range(1, 11)]
    )
    assert np.all((losses >= 0) & (losses <= 1 + 1e-12))
    assert np.all(np.diff(losses, axis=0) <= 1e-12)
    heavier = information_losses(statistics, WeightedNodes(order[:4], omega[order[:4]] * 2), lam)
    assert np.all(np.array(heavier) <= losses[3] + 1e-12)


def test_losses_where_there_is_nothing_to_lose():
    covariance, gram, _ = problem(4)
    whole = WeightedNodes(np.arange(4), np.ones(4))
    assert information_losses(NodeStatistics(covariance, gram * 0, np.ones(4)), whole, 0.1)[1] == 0
    assert information_losses(NodeStatistics(covariance * 0, gram, np.ones(4)), whole, 0.1) == (0, 0)
    nearly = information_losses(NodeStatistics(covariance, gram, np.ones(4)), whole, 1e-12)
    assert max(nearly) < 1e-10


# The other rules


@pytest.mark.parametrize("seed", range(5))
def test_pivoted_cholesky_against_its_definition(seed):
    covariance = random_covariance(20, seed)
    assert pivoted_cholesky_nodes(covariance, 15).tolist() == naive_pivots(covariance, 15)
    statistics = NodeStatistics(covariance, np.eye(20), np.ones(20))
    assert select_nodes("cholesky", statistics, 15, lam=0.1).tolist() == naive_pivots(covariance, 15)


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_pivoted_cholesky_of_a_singular_matrix(rank):
    covariance = random_covariance(10, 3, rank=rank)
    found = pivoted_cholesky_nodes(covariance, 10)
    assert sorted(found) == list(range(10))
    assert found[:rank].tolist() == naive_pivots(covariance, rank)


def test_leverage_draws_follow_the_scores():
    scores = leverage_scores(random_covariance(6, 2), 0.1)
    generator = np.random.default_rng(0)
    draws = np.array([leverage_nodes(scores, 2, generator) for _ in range(20_000)])
    assert np.all(draws[:, 0] != draws[:, 1])
    first = np.bincount(draws[:, 0], minlength=6)
    assert stats.chisquare(first, scores * 20_000).pvalue > 1e-3
    # The second different node: in proportion to the scores that are left.
    expected = np.array([scores[i] * scores[j] / (1 - scores[i]) for i in range(6) for j in range(6) if i != j])
    pairs = np.bincount(draws[:, 0] * 6 + draws[:, 1], minlength=36).reshape(6, 6)[~np.eye(6, dtype=bool)]
    assert stats.chisquare(pairs, expected * 20_000).pvalue > 1e-3


def test_leverage_draws_are_distinct_and_positive():
    scores = np.array([0.5, 0.0, 0.3, 0.2, 0.0])
    for seed in range(20):
        found = leverage_nodes(scores, 3, np.random.default_rng(seed))
        assert sorted(found) == [0, 2, 3]
    assert sorted(leverage_nodes(scores, 4, np.random.default_rng(0))) == [0, 1, 2, 3]  # dead nodes fill up, in order
    assert sorted(leverage_nodes(scores, 5, np.random.default_rng(0))) == [0, 1, 2, 3, 4]


def statistics_of(size=9, seed=0):
    covariance, gram, _ = problem(size, seed)
    return NodeStatistics(covariance, gram, np.random.default_rng(seed).uniform(1, 2, size))


def test_magnitude_takes_the_largest():
    entry = statistics_of()
    found = select_nodes("magnitude", entry, 4, lam=0.1)
    assert found.tolist() == sorted(range(9), key=lambda j: -entry.magnitudes[j])[:4]
    equal = NodeStatistics(entry.covariance, entry.consumer_gram, np.ones(9))
    assert select_nodes("magnitude", equal, 3, lam=0.1).tolist() == [0, 1, 2]


def test_random_takes_every_subset_equally_often():
    entry = statistics_of(4)
    generator = np.random.default_rng(1)
    counts = {}
    for _ in range(6000):
        found = tuple(sorted(select_nodes("random", entry, 2, lam=0.1, generator=generator).tolist()))
        counts[found] = counts.get(found, 0) + 1
    assert len(counts) == 6
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_the_greedy_rule_takes_its_regulariser_from_the_leverage_scores():
    sensitive = 0
    for seed in range(20):
        entry = statistics_of(seed=seed)
        lam = 0.3 * np.trace(entry.covariance)
        scores = leverage_scores(entry.covariance, lam)
        expected = naive_greedy(entry.covariance, entry.consumer_gram, 5, lam * 5 * scores, 0.3)
        assert select_nodes("greedy", entry, 5, lam=lam, theta=0.3).tolist() == expected
        sensitive += expected != naive_greedy(entry.covariance, entry.consumer_gram, 5, lam * scores, 0.3)
    assert sensitive  # in some of these cases a draw's share of the size matters


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_gives_different_nodes_and_repeats_itself(rule):
    entry = statistics_of()
    for size in (1, 5, 9):
        found = select_nodes(rule, entry, size, lam=0.1, theta=0.5)
        assert len(set(found.tolist())) == size
        assert set(found.tolist()) <= set(range(9))
        assert found.tolist() == select_nodes(rule, entry, size, lam=0.1, theta=0.5).tolist()
    for size in (0, 10):
        with pytest.raises(ValueError, match=f"size={size}: the group has 9 nodes"):
            select_nodes(rule, entry, size, lam=0.1)


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match=r"selection='best': expected one of \['cholesky', 'greedy'"):
        select_nodes("best", statistics_of(), 2, lam=0.1)
