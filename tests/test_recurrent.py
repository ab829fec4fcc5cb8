import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import rnn as packing

from specprune.bounds.nodes import WeightedNodes
from specprune.compress.batches import CalibrationData
from specprune.compress.blocks import greedy_path
from specprune.compress.groups import agreement_error
from specprune.compress.moments import LayerMoments
from specprune.compress.recurrent import (
    consumer_gram,
    hidden_moments,
    recurrent_item,
    recurrent_losses,
    slice_recurrent,
    zero_hidden,
)
from specprune.compress.recurrent_groups import recurrent_groups
from specprune.compress.recurrent_refit import refit_recurrent, refit_recurrent_inputs
from specprune.compress.selection import greedy_nodes
from specprune.compress.surgery import dropped_units, mask_nodes, remove_nodes
from specprune.compress.tracing import small_batch, trace

KINDS = [nn.RNN, nn.GRU, nn.LSTM]
INPUTS, HIDDEN, STEPS, OUTPUTS = 3, 8, 6, 2


class Net(nn.Module):
    """One recurrent layer and a reader; `read` says what the reader gets."""

    def __init__(self, kind, read, batch_first=True, reader_inputs=HIDDEN, **options):
        super().__init__()
        self.rnn = kind(INPUTS, HIDDEN, batch_first=batch_first, **options)
        self.head = nn.Linear(reader_inputs, OUTPUTS)
        self.read = read

    def forward(self, x):
        states, last = self.rnn(x)
        return self.head(self.read(states, last))


def final(last):
    return (last[0] if isinstance(last, tuple) else last)[-1]


def groups_of(net, inputs):
    data = CalibrationData([inputs])
    batch = small_batch(data.first(net))

    def fault(group):
        for keep in (np.arange(group.width // 2), np.arange(1, group.width, 2)):
            error = removal_error(net, group, keep, data, batch)
            if not error <= 1:
                return f"removing and zeroing differ by {error}"
        return ""

    net.eval()
    return recurrent_groups(net, data, batch, trace(copy.deepcopy(net), data, batch), fault)


def removal_error(net, group, keep, data, batch):
    zeroed = copy.deepcopy(net)
    mask_nodes(zeroed, [group], {group.name: keep})
    zero_hidden(zeroed.get_submodule(group.name), dropped_units(group, keep))
    try:
        small = remove_nodes(net, [group], {group.name: keep})
        return agreement_error(small.eval(), zeroed.eval(), data, batch)
    except RuntimeError:
        return math.inf


def inputs_of(batch_first=True, seed=0, samples=4):
    x = torch.randn(samples, STEPS, INPUTS, generator=torch.Generator().manual_seed(seed))
    return x if batch_first else x.transpose(0, 1).contiguous()


# --- cutting


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_cut_layer_equals_a_smaller_one_with_copied_weights(kind, bias):
    torch.manual_seed(0)
    big = kind(INPUTS, HIDDEN, bias=bias, batch_first=True).double()
    drop, keep = np.array([1, 4, 5]), [0, 2, 3, 6, 7]
    zero_hidden(big, drop)
    with torch.no_grad():
        big.weight_ih_l0[:, 1] = 0
    small = kind(INPUTS - 1, len(keep), bias=bias, batch_first=True).double()
    with torch.no_grad():
        for gate in range(len(big.weight_hh_l0) // HIDDEN):
            for place, node in enumerate(keep):
                row, own = gate * HIDDEN + node, gate * len(keep) + place
                small.weight_ih_l0[own] = big.weight_ih_l0[row, [0, 2]]
                small.weight_hh_l0[own] = big.weight_hh_l0[row, keep]
                if bias:
                    small.bias_ih_l0[own], small.bias_hh_l0[own] = big.bias_ih_l0[row], big.bias_hh_l0[row]
    x = inputs_of().double()
    before = big(x)[0]
    slice_recurrent(big, drop, np.array([1]))
    after = big(x[..., [0, 2]])[0]
    torch.testing.assert_close(after, small(x[..., [0, 2]])[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(after, before[..., keep], rtol=0, atol=1e-14)
    assert (big.hidden_size, big.input_size) == (5, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_layer_can_be_copied_saved_trained_and_cast(kind):
    torch.manual_seed(0)
    layer = kind(INPUTS, HIDDEN, batch_first=True)
    slice_recurrent(layer, np.array([0, 7]), np.array([], dtype=int))
    x = inputs_of()
    expected = layer(x)[0]
    assert torch.equal(copy.deepcopy(layer)(x)[0], expected)
    fresh = kind(INPUTS, HIDDEN - 2, batch_first=True)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x)[0], expected)
    assert [p.data_ptr() for p in layer.parameters()] == [p.data_ptr() for p in layer._flat_weights]
    torch.testing.assert_close(copy.deepcopy(layer).double()(x.double())[0].float(), expected)
    optimiser = torch.optim.SGD(layer.parameters(), 0.1)
    expected.square().sum().backward()
    optimiser.step()
    assert not torch.allclose(layer(x)[0], expected)


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}, {"proj_size": 2}])
def test_cutting_refuses_what_it_cannot_do(options):
    with pytest.raises(ValueError, match="cannot take nodes out"):
        slice_recurrent(nn.LSTM(INPUTS, HIDDEN, **options), np.array([0]), np.array([], dtype=int))


@pytest.mark.parametrize("drop", [[8], [-1], list(range(8))])
def test_cutting_refuses_bad_indices(drop):
    with pytest.raises(ValueError, match="8 hidden nodes"):
        slice_recurrent(nn.RNN(INPUTS, HIDDEN), np.array(drop), np.array([], dtype=int))


# --- groups


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", ["last_step", "all_steps", "last_state", "relu"])
def test_groups_of_one_layer(kind, read, batch_first):
    reads = {
        "last_step": lambda states, last: states[:, -1] if batch_first else states[-1],
        "all_steps": lambda states, last: states,
        "last_state": lambda states, last: final(last),
        "relu": lambda states, last: functional.relu(-final(last)),
    }
    net = Net(kind, reads[read], batch_first)
    groups, skipped = groups_of(net, inputs_of(batch_first))
    assert skipped == []
    (group,) = groups
    assert (group.name, group.kind, group.width) == ("rnn", "hidden", HIDDEN)
    assert [entry.module for entry in group.consumers] == ["head"]
    np.testing.assert_array_equal(group.consumers[0].index, np.arange(HIDDEN)[:, None])
    np.testing.assert_array_equal(group.producers[0].index, np.arange(HIDDEN)[:, None])


def test_flattened_steps_are_slots_and_concatenations_are_found():
    net = Net(nn.GRU, lambda states, last: states.flatten(1), reader_inputs=STEPS * HIDDEN)
    (group,), _ = groups_of(net, inputs_of())
    expected = np.arange(STEPS)[None, :] * HIDDEN + np.arange(HIDDEN)[:, None]
    np.testing.assert_array_equal(group.consumers[0].index, expected)
    net = Net(nn.LSTM, lambda states, last: torch.cat([final(last), states.amax(1)], 1), reader_inputs=2 * HIDDEN)
    (group,), _ = groups_of(net, inputs_of())
    np.testing.assert_array_equal(group.consumers[0].index, np.arange(2 * HIDDEN).reshape(2, HIDDEN).T)


class Stacked(nn.Module):
    def __init__(self, first, second, batch_first):
        super().__init__()
        self.one = first(INPUTS, HIDDEN, batch_first=batch_first)
        self.drop = nn.Dropout(0.5)
        self.two = second(HIDDEN, 5, batch_first=batch_first)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, OUTPUTS)
        self.side = nn.Conv1d(HIDDEN, OUTPUTS, 2)
        self.batch_first = batch_first

    def forward(self, x):
        states, _ = self.one(x)
        deep = final(self.two(self.drop(states))[1])
        rows = states if self.batch_first else states.transpose(0, 1)
        return self.head(self.norm(deep)) + self.side(rows.transpose(1, 2)).mean(2)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("first", "second"), [(nn.LSTM, nn.LSTM), (nn.RNN, nn.GRU)])
def test_stacked_layers_carriers_and_branches(first, second, batch_first):
    torch.manual_seed(0)
    net = Stacked(first, second, batch_first)
    with torch.no_grad():
        net.norm.running_mean.uniform_(-1, 1)
        net.norm.weight.uniform_(0.5, 2)
    x = inputs_of(batch_first)
    groups, skipped = groups_of(net, x)
    assert skipped == []
    assert [group.name for group in groups] == ["one", "two"]
    assert [[entry.module for entry in group.consumers] for group in groups] == [["two", "side"], ["head"]]
    assert [entry.module for entry in groups[1].carriers] == ["norm"]
    # Both at once: the second layer loses nodes and inputs in one cut.
    keep = {"one": np.array([0, 3, 4, 7]), "two": np.array([1, 2])}
    zeroed = copy.deepcopy(net)
    mask_nodes(zeroed, groups, keep)
    for group in groups:
        zero_hidden(zeroed.get_submodule(group.name), dropped_units(group, keep[group.name]))
    small = remove_nodes(net, groups, keep)
    torch.testing.assert_close(small(x), zeroed(x))
    assert (small.two.input_size, small.two.hidden_size, small.norm.num_features) == (4, 2, 2)


def test_the_callers_network_stays_as_it_is():
    net = Net(nn.LSTM, lambda states, last: final(last)).eval()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    groups_of(net, inputs_of())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert net.rnn._forward_hooks == {}
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())


class GivenState(Net):
    def forward(self, x):
        return self.head(self.rnn(x, torch.zeros(1, len(x), HIDDEN, dtype=x.dtype))[0])


class Packed(Net):
    def forward(self, x):
        packed = packing.pack_padded_sequence(x, torch.full((len(x),), STEPS), batch_first=True)
        return self.head(packing.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


class Translator(Net):
    def __init__(self):
        super().__init__(nn.GRU, None)
        self.decoder = nn.GRU(INPUTS, HIDDEN, batch_first=True)

    def forward(self, x):
        return self.head(self.decoder(x, self.rnn(x)[1])[0])


class Attended(Net):
    def __init__(self):
        super().__init__(nn.GRU, None)
        self.attention = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)

    def forward(self, x):
        states = self.rnn(x)[0]
        return self.head(self.attention(states, states, states)[0])


class Normed(Net):
    def __init__(self):
        super().__init__(nn.GRU, None)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x):
        return self.head(self.norm(self.rnn(x)[0]))


def states_of(states, last):
    return states


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Net(nn.LSTM, states_of, num_layers=2), "2 layers in one module"),
        (Net(nn.GRU, states_of, bidirectional=True, reader_inputs=2 * HIDDEN), "bidirectional"),
        (Net(nn.LSTM, states_of, proj_size=5, reader_inputs=5), "proj_size=5"),
        (GivenState(nn.GRU, None), "first hidden state is passed by the caller"),
        (Packed(nn.GRU, None), "PackedSequence"),
        (Translator(), "'decoder' reads its hidden states otherwise"),
        (Attended(), "'attention' reads its hidden states otherwise"),
        (Normed(), "several hidden state nodes"),
        (Net(nn.LSTM, lambda states, last: states + last[1].transpose(0, 1)), "'head' reads its cell state"),
        (Net(nn.GRU, lambda states, last: states[..., :5], reader_inputs=5), "more often than others"),
        (Net(nn.GRU, lambda states, last: states.cumsum(2)), "several hidden state nodes"),
        (Net(nn.GRU, lambda states, last: states.flip(2)[..., :] * 1.0), ""),
        (Net(nn.GRU, lambda states, last: states.detach()), "no layer reads"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else type(value).__name__,
)
def test_what_is_left_whole_has_a_reason(net, reason):
    groups, skipped = groups_of(net, inputs_of())
    if not reason:  # nodes in another order are found, and removing them agrees with zeroing
        np.testing.assert_array_equal(groups[0].consumers[0].index, np.arange(HIDDEN)[::-1, None])
        return
    found = {entry.name: entry.reason for entry in skipped}
    assert not [group for group in groups if group.name == "rnn"]
    assert reason in found["rnn"]


def test_hidden_states_in_the_output_are_left_whole():
    class Leaking(Net):
        def forward(self, x):
            states = self.rnn(x)[0]
            return torch.cat([self.head(states), states], -1)

    _, (entry,) = groups_of(Leaking(nn.RNN, None), inputs_of())
    assert "outputs of the network" in entry.reason


def test_a_fault_found_by_the_caller_is_the_reason():
    net = Net(nn.RNN, states_of).eval()
    data = CalibrationData([inputs_of()])
    batch = small_batch(data.first(net))
    groups, skipped = recurrent_groups(net, data, batch, trace(net, data, batch), lambda group: f"no {group.name}")
    assert groups == []
    assert [(entry.name, entry.reason) for entry in skipped] == [("rnn", "no rnn")]


# --- moments, losses, selection


@pytest.mark.parametrize("batch_first", [True, False])
def test_moments_are_time_means_over_all_batches(batch_first):
    net = Net(nn.LSTM, states_of, batch_first).eval()
    batches = [inputs_of(batch_first, seed) for seed in range(3)]
    if not batch_first:  # the batches' first axis is then time, which is all that counts for the sums
        batches = [batch.contiguous() for batch in batches]
    found = hidden_moments(net, "rnn", CalibrationData(batches))
    rows = torch.cat([net.rnn(batch)[0].reshape(-1, HIDDEN) for batch in batches]).double()
    assert found.rows == 3 * 4 * STEPS
    np.testing.assert_allclose(found.covariance(), (rows.T @ rows / len(rows)).detach().numpy(), atol=1e-12)


def some_problem(seed=0, width=7):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((50, width)) @ rng.standard_normal((width, width))
    return rows.T @ rows / 50, rng.standard_normal((3, width)), rng.standard_normal((4 * width, width))


def test_losses_are_the_dense_formulas():
    covariance, readout, recurrence = some_problem()
    kept, omega, lam = np.array([1, 4, 5]), np.array([0.5, 1.0, 2.0]), 0.3
    block = covariance[np.ix_(kept, kept)] + np.diag(lam / omega)
    residual = covariance - covariance[:, kept] @ np.linalg.inv(block) @ covariance[kept]
    expected = [np.trace(z @ residual @ z.T) / np.trace(z @ covariance @ z.T) for z in (np.eye(7), readout, recurrence)]
    found = recurrent_losses(covariance, readout, recurrence, WeightedNodes(kept, omega), lam)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert all(0 < loss < 1 for loss in found)
    gram = consumer_gram(covariance, readout, recurrence)
    assert np.sum(gram * residual) == pytest.approx(expected[1] + expected[2])


def test_losses_refuse_weights_of_another_width():
    covariance, readout, recurrence = some_problem()
    with pytest.raises(ValueError, match="cannot read 7 nodes"):
        recurrent_losses(covariance, readout[:, :5], recurrence, WeightedNodes(np.array([0]), np.ones(1)), 0.1)


def test_selection_item_gives_the_greedy_order_of_the_recurrent_loss():
    covariance, _, recurrence = some_problem()
    moments = LayerMoments(50, torch.zeros(7, dtype=torch.float64), 50 * torch.as_tensor(covariance))
    item = recurrent_item(torch.as_tensor(recurrence), moments, intercept=False)
    ridge = 1e-9 * np.trace(covariance) / 7
    expected = greedy_nodes(covariance, recurrence.T @ recurrence, 4, tau=ridge, theta=0.0)
    path = greedy_path([item], 4, 1e-9)
    np.testing.assert_array_equal(path.order, expected)
    losses = recurrent_losses(covariance, recurrence, recurrence, WeightedNodes(path.order, np.ones(4)), ridge)
    assert 1 - path.values.sum() == pytest.approx(losses[2], abs=1e-9)


# --- refitting


def masked(net, group, kept):
    work = copy.deepcopy(net).eval()
    mask_nodes(work, [group], {group.name: kept})
    zero_hidden(work.get_submodule(group.name), dropped_units(group, kept))
    return work


def refit_head(original, work, kept, x):
    """Least squares of the original outputs on the kept states that the network now has."""
    with torch.no_grad():
        states = work.rnn(x)[0][..., kept].double().reshape(-1, len(kept))
        rows = torch.cat([states, torch.ones(len(states), 1, dtype=torch.float64)], 1)
        target = original.head(original.rnn(x)[0]).double().reshape(-1, OUTPUTS)
        solution = torch.linalg.lstsq(rows, target, driver="gelsd").solution
        work.head.weight.zero_()
        work.head.weight[:, kept] = solution[:-1].T.to(work.head.weight.dtype)
        work.head.bias.copy_(solution[-1])


def error_of(original, work, x):
    with torch.no_grad():
        wanted = original(x)
        return float((work(x) - wanted).norm() / (wanted - wanted.mean((0, 1))).norm())


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
def test_duplicated_nodes_are_replaced_exactly(nonlinearity, batch_first, sequential):
    torch.manual_seed(0)
    net = Net(nn.RNN, states_of, batch_first, nonlinearity=nonlinearity).double().eval()
    with torch.no_grad():  # nodes 5, 6, 7 do what nodes 0, 1, 2 do, but are read with weights of their own
        net.rnn.weight_hh_l0.mul_(1.5)
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            tensor = getattr(net.rnn, name)
            tensor[5:8] = tensor[0:3]
    x = inputs_of(batch_first, samples=64).double()
    (group,), _ = groups_of(net, x)
    kept = np.arange(5)
    work = masked(net, group, kept)
    plain = copy.deepcopy(work)
    refit_recurrent(net, work, "rnn", kept, CalibrationData([x]), ridge=0.0, sequential=sequential)
    refit_head(net, work, kept, x)
    assert float(work.rnn.weight_hh_l0.detach()[:, 5:].abs().max()) == 0
    refit_head(net, plain, kept, x)
    assert error_of(net, plain, x) > 1e-2
    fresh = inputs_of(batch_first, seed=9).double()
    assert error_of(net, work, fresh) < 1e-8
    small = remove_nodes(work, [group], {"rnn": kept})
    torch.testing.assert_close(small(fresh), work(fresh))


def sine_batches(seed, samples=96, steps=20):
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(steps + 1)[None, :, None] / 3
    phase, speed = (torch.rand(samples, 1, INPUTS, generator=generator) for _ in range(2))
    wave = torch.sin((0.5 + speed) * time + 6.3 * phase)
    return wave[:, :-1], wave[:, 1:, :OUTPUTS]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def trained(request):
    torch.manual_seed(0)
    net = Net(request.param, states_of, reader_inputs=32)
    net.rnn = request.param(INPUTS, 32, batch_first=True)
    x, y = sine_batches(0)
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(150):
        optimiser.zero_grad()
        functional.mse_loss(net(x), y).backward()
        optimiser.step()
    return net.eval()


def pruned_error(net, group, kept, mode):
    x, _ = sine_batches(0)
    work = masked(net, group, kept)
    if mode != "none":
        refit_recurrent(net, work, "rnn", kept, CalibrationData([x]), ridge=1e-6, sequential=mode == "sequential")
    refit_head(net, work, kept, x)
    return error_of(net, work, sine_batches(1)[0])


def test_refit_beats_plain_cut_and_selection_beats_random(trained):
    x, _ = sine_batches(0)
    (group,), _ = groups_of(trained, x)
    moments = hidden_moments(trained, "rnn", CalibrationData([x]))
    items = [
        recurrent_item(trained.rnn.weight_hh_l0, moments, intercept=True),
        recurrent_item(trained.head.weight, moments, intercept=True),
    ]
    chosen = np.sort(greedy_path(items, 14, 1e-6).order)
    errors = {mode: pruned_error(trained, group, chosen, mode) for mode in ("none", "fold", "sequential")}
    assert errors["sequential"] < 0.7 * errors["none"]
    assert errors["sequential"] <= 1.05 * errors["fold"]
    rng = np.random.default_rng(0)
    drawn = [pruned_error(trained, group, np.sort(rng.permutation(32)[:14]), "sequential") for _ in range(5)]
    assert errors["sequential"] < np.mean(drawn)


def test_refit_keeps_everything_where_nothing_goes(trained):
    (group,), _ = groups_of(trained, sine_batches(0)[0])
    assert pruned_error(trained, group, np.arange(32), "sequential") < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_changed_inputs_are_made_up_for(kind):
    # The third input repeats the first two; without it, refitted input weights give the same gates.
    torch.manual_seed(0)
    net = Net(kind, states_of).double().eval()
    x = inputs_of(samples=32).double()
    x[..., 2] = 2 * x[..., 0] - x[..., 1] + 0.3
    work = copy.deepcopy(net)
    refit_recurrent_inputs(net, work, "rnn", np.array([0, 1]), CalibrationData([x]), ridge=0.0, sequential=True)
    assert float(work.rnn.weight_ih_l0.detach()[:, 2].abs().max()) == 0
    torch.testing.assert_close(work(x), net(x), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM])
def test_recurrence_makes_up_for_a_shift_of_the_inputs(kind):
    # An input bias that was lost upstream comes back through the recurrent bias, by the sequential refit alone.
    torch.manual_seed(0)
    net = Net(kind, states_of).double().eval()
    x = inputs_of(samples=32).double()
    work = copy.deepcopy(net)
    with torch.no_grad():
        work.rnn.bias_ih_l0.sub_(1.0)
    assert error_of(net, work, x) > 0.1
    refit_recurrent(net, work, "rnn", np.arange(HIDDEN), CalibrationData([x]), ridge=0.0, sequential=True)
    assert error_of(net, work, x) < 1e-8


def test_gru_candidate_gate_takes_nothing_from_the_inputs():
    # Its recurrent part is multiplied by another gate before the inputs are added, so a constant cannot move across.
    torch.manual_seed(0)
    net = Net(nn.GRU, states_of).double().eval()
    x = inputs_of(samples=32).double()
    work = copy.deepcopy(net)
    with torch.no_grad():
        work.rnn.bias_ih_l0.sub_(1.0)
    refit_recurrent(net, work, "rnn", np.arange(HIDDEN), CalibrationData([x]), ridge=0.0, sequential=True)
    moved = (work.rnn.bias_hh_l0 - net.rnn.bias_hh_l0).detach().reshape(3, HIDDEN)
    torch.testing.assert_close(moved, torch.tensor([[1.0], [1.0], [0.0]]).double().expand(3, HIDDEN), rtol=0, atol=0.2)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_refit_does_not_depend_on_the_order_of_axes(kind, sequential):
    torch.manual_seed(0)
    net = Net(kind, states_of).double().eval()
    other = Net(kind, states_of, batch_first=False).double().eval()
    other.load_state_dict(net.state_dict())
    x = inputs_of(samples=32).double()
    found = []
    for original, inputs in ((net, x), (other, x.transpose(0, 1).contiguous())):
        work = copy.deepcopy(original)
        kept = np.array([0, 2, 3, 6])
        refit_recurrent(original, work, "rnn", kept, CalibrationData([inputs]), ridge=1e-6, sequential=sequential)
        found.append(work.rnn.weight_hh_l0.detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-8)
    if not sequential:  # the sequential one may find that the plain cut is best
        assert not torch.allclose(found[0][:, kept], net.rnn.weight_hh_l0.detach()[:, kept], atol=1e-3)
