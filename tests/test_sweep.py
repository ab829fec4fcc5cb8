"""Pruning to several budgets at once, and the targets that are kept between refits."""

import pytest
import torch
from helpers import small_convnet, tensor
from torch.utils.data import DataLoader, TensorDataset

from specprune.compress import CalibrationData, find_groups, prune, prune_sweep
from specprune.compress import targets as targets_module
from specprune.compress.batches import fingerprint
from specprune.compress.layers import get_layer
from specprune.compress.targets import Targets

IMAGES = tensor(48, 2, 8, 8)


def same(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("allocation", ["calibrated", "uniform"])
@pytest.mark.parametrize("selection", ["backward", "random"])
def test_a_sweep_gives_what_single_calls_give(allocation, selection):
    model, batches = small_convnet(), list(IMAGES.split(16))
    keeps = [0.7, 0.4]
    options = {"allocation": allocation, "selection": selection, "positions": 4, "seed": 3}
    for keep, pruned in zip(keeps, prune_sweep(model, batches, keeps, **options), strict=True):
        single = prune(model, batches, keep, **options)
        assert same(pruned.model, single.model)
        assert pruned.report.settings == single.report.settings
        assert pruned.report.settings["keep"] == keep


def test_a_sweep_needs_budgets_and_known_options():
    with pytest.raises(ValueError, match="keeps is empty"):
        prune_sweep(small_convnet(), [IMAGES], [])
    with pytest.raises(TypeError, match="colour"):
        prune_sweep(small_convnet(), [IMAGES], [0.5], colour="red")


def make_targets(model, data, **options):
    groups = find_groups(model, data)
    names = list(dict.fromkeys(entry.module for group in groups.groups for entry in group.consumers))
    return Targets(model, data, names, groups.direct, [], **{"positions": 5, "seed": 1, **options}), names


def test_targets_are_the_outputs_at_the_drawn_positions():
    model = small_convnet().eval()
    data = CalibrationData([IMAGES])
    targets, names = make_targets(model, data)
    for name, (drawn, rows) in targets.of(IMAGES, names).items():
        seen = []
        handle = get_layer(model, name).register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        with torch.no_grad():
            model(IMAGES)
        handle.remove()
        assert torch.equal(rows, drawn.rows(get_layer(model, name), seen[0]))


def test_kept_targets_are_those_computed_anew(monkeypatch):
    model = small_convnet().eval()
    data = CalibrationData(list(IMAGES.split(16)))
    (kept, names), (anew, _) = make_targets(model, data), make_targets(model, data)
    runs = []
    monkeypatch.setattr(model, "forward", lambda x, run=model.forward: runs.append(1) or run(x))
    first = [kept.of(batch, names) for batch in IMAGES.split(16)]
    count = len(runs)
    again = [kept.of(batch, names) for batch in IMAGES.split(16)]
    assert len(runs) == count
    monkeypatch.setattr(targets_module, "CACHE_BYTES", 0)
    fresh = [anew.of(batch, names) for batch in IMAGES.split(16)]
    assert len(runs) > count
    for one, two, three in zip(first, again, fresh, strict=True):
        for name in names:
            assert torch.equal(one[name][1], two[name][1])
            assert torch.equal(one[name][1], three[name][1])


def test_the_order_of_samples_is_part_of_the_fingerprint():
    assert fingerprint(IMAGES) == fingerprint(IMAGES.clone())
    assert fingerprint(IMAGES) != fingerprint(IMAGES.flip(0))


def test_a_shuffling_loader_is_refitted_on_its_own_rows():
    """The rows of inputs and targets must belong together in every pass: with wrong pairs nothing could be told."""
    torch.manual_seed(0)
    model = small_convnet().eval()
    loader = DataLoader(TensorDataset(IMAGES), batch_size=48, shuffle=True)
    shuffled = prune(model, loader, 0.6, positions=None)
    fixed = prune(model, [IMAGES], 0.6, positions=None)
    with torch.no_grad():
        assert torch.allclose(shuffled.model(IMAGES), fixed.model(IMAGES), atol=1e-4)
