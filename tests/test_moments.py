"""Streaming second moments against dense ones, and the files they are kept in."""

import tracemalloc

import numpy as np
import pytest
import torch
from helpers import assert_unchanged, small_convnet, small_mlp, snapshot, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from specprune.compress import LayerMoments, Moments, collect_moments
from specprune.compress.layers import Positions, channel_rows, output_size, patch_rows, weight_matrix
from specprune.compress.moments import collection_bytes

IMAGES = tensor(10, 2, 8, 8)
CONVS = {
    "plain": {"kernel_size": 3},
    "padding": {"kernel_size": 3, "padding": (1, 2)},
    "stride": {"kernel_size": (3, 2), "stride": (2, 3), "padding": 1},
    "dilation": {"kernel_size": (2, 3), "dilation": (2, 1), "padding": (1, 0)},
    "same": {"kernel_size": (2, 3), "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular", "stride": 2},
    "no bias": {"kernel_size": 1, "bias": False},
}


def dense_patches(layer, inputs):
    """The definition, pixel by pixel: what the kernel covers at every output position."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    height, width = layer(inputs).shape[2:]
    rows = []
    for image in padded:
        for y in range(height):
            for x in range(width):
                window = [
                    image[c, y * layer.stride[0] + a * layer.dilation[0], x * layer.stride[1] + b * layer.dilation[1]]
                    for c in range(layer.in_channels)
                    for a in range(layer.kernel_size[0])
                    for b in range(layer.kernel_size[1])
                ]
                rows.append(torch.stack(window))
    return torch.stack(rows).double()


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
def test_rows_times_weights_are_the_outputs_of_a_convolution(options):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, **options).double()
    inputs = IMAGES.double()
    expected = layer(inputs)
    rows = patch_rows(layer, inputs, Positions(None))
    bias = 0 if layer.bias is None else layer.bias
    outputs = (rows @ weight_matrix(layer).T + bias).reshape(10, -1, 3).transpose(1, 2)
    assert torch.allclose(outputs, expected.flatten(2), atol=1e-12)
    assert output_size(layer, inputs) == tuple(expected.shape[2:])
    assert rows.shape[1] == 2 * layer.weight[0, 0].numel()


def test_rows_times_weights_are_the_outputs_of_a_linear_layer():
    torch.manual_seed(0)
    layer = nn.Linear(8, 5).double()
    for inputs in (tensor(6, 8).double(), tensor(6, 4, 8).double()):
        rows = patch_rows(layer, inputs, Positions(None))
        assert torch.allclose(rows @ weight_matrix(layer).T + layer.bias, layer(inputs).reshape(-1, 5), atol=1e-13)
        assert torch.equal(rows, channel_rows(layer, inputs))


def test_drawn_rows_are_the_rows_of_the_drawn_positions():
    layer = nn.Conv2d(2, 3, 3, padding=1, stride=2)
    drawn = Positions.draw(layer, IMAGES, 5, torch.Generator().manual_seed(3))
    everything = patch_rows(layer, IMAGES, Positions(None)).reshape(10, 16, 18)
    expected = torch.stack([everything[k, drawn.index[k]] for k in range(10)]).reshape(50, 18)
    assert torch.equal(patch_rows(layer, IMAGES, drawn), expected)
    generator = torch.Generator()
    assert Positions.draw(layer, IMAGES, 16, generator).index is None
    assert Positions.draw(layer, IMAGES, None, generator).index is None
    assert Positions.draw(nn.Linear(8, 2), IMAGES, 1, generator).index is None


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
def test_patch_moments_of_a_convolution(options):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, **options)
    rows = dense_patches(layer, IMAGES)
    moments = collect_moments(nn.Sequential(layer), [IMAGES[:4], IMAGES[4:]], level="patch")["0"]
    assert moments.rows == len(rows)
    np.testing.assert_allclose(moments.covariance(), (rows.T @ rows / len(rows)).numpy(), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(moments.mean(), rows.mean(0).numpy(), rtol=1e-6, atol=1e-7)
    double = collect_moments(nn.Sequential(layer).double(), list(IMAGES.double().split(6)), level="patch")["0"]
    np.testing.assert_allclose(double.covariance(), (rows.T @ rows / len(rows)).numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(double.mean(), rows.mean(0).numpy(), rtol=1e-12, atol=1e-14)


def layer_inputs(model, images, name):
    """What the layer reads, by running the children before it."""
    children = list(model.named_children())
    for child, module in children:
        if child == name:
            return images.detach()
        images = module(images)
    raise AssertionError(name)


def test_moments_of_all_layers_of_a_network():
    model = small_convnet().eval()
    moments = collect_moments(model, IMAGES.split(3))
    assert list(moments) == ["conv1", "conv2", "fc1", "fc2"]
    assert (moments.samples, moments.level, len(moments)) == (10, "channel", 4)
    for name in moments:
        inputs = layer_inputs(model, IMAGES, name).double()
        rows = inputs if inputs.dim() == 2 else inputs.permute(0, 2, 3, 1).reshape(-1, inputs.shape[1])
        expected = (rows.T @ rows / len(rows)).numpy()
        np.testing.assert_allclose(moments[name].covariance(), expected, rtol=1e-6, atol=1e-7)
        centred = np.cov(rows.numpy(), rowvar=False, bias=True)
        np.testing.assert_allclose(moments[name].covariance(centred=True), centred, rtol=1e-5, atol=1e-6)


def test_centred_covariance_of_float64_rows():
    rows = tensor(50, 4, dtype=torch.float64) + 3
    moments = LayerMoments.of(rows)
    expected = np.cov(rows.numpy(), rowvar=False, bias=True)
    np.testing.assert_allclose(moments.covariance(centred=True), expected, rtol=1e-12, atol=1e-13)


def test_flattened_columns_are_averaged_over_the_pixels_of_a_node():
    maps = tensor(12, 5, 2, 2, dtype=torch.float64)
    moments = LayerMoments.of(maps.flatten(1))
    rows = maps.permute(0, 2, 3, 1).reshape(-1, 5)
    np.testing.assert_allclose(moments.node_covariance(5), (rows.T @ rows / len(rows)).numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(moments.node_covariance(20), moments.covariance())
    with pytest.raises(ValueError, match="20 columns do not divide into 3 nodes"):
        moments.node_covariance(3)


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, 9), level=st.sampled_from(["channel", "patch"]), size=st.integers(1, 10))
def test_moments_depend_neither_on_the_split_nor_on_merging(cut, level, size):
    model = small_convnet().double()
    images = IMAGES.double()
    whole = collect_moments(model, [images], level=level)
    merged = collect_moments(model, [images[:cut]], level=level) + collect_moments(model, [images[cut:]], level=level)
    split = collect_moments(model, list(images.split(size)), level=level)
    for other in (merged, split):
        assert other.samples == whole.samples
        assert list(other) == list(whole)
        for name in whole:
            assert other[name].rows == whole[name].rows
            torch.testing.assert_close(other[name].gram, whole[name].gram, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(other[name].total, whole[name].total, rtol=1e-12, atol=1e-12)


def test_moments_of_different_things_do_not_merge():
    x = tensor(6, 8)
    moments = collect_moments(small_mlp(), [x])
    for other in (
        collect_moments(small_mlp(), [x], ["fc1"]),
        collect_moments(small_mlp(), [x], level="patch"),
    ):
        with pytest.raises(ValueError, match="cannot merge moments of channel level"):
            moments + other
    with pytest.raises(ValueError, match="cannot merge moments of 8 and 5 columns"):
        LayerMoments.of(x) + LayerMoments.of(x[:, :5])


def test_float32_data_are_summed_in_float64():
    rows = torch.full((1, 1), 1e4, dtype=torch.float32)
    model = nn.Sequential(nn.Linear(1, 1))
    moments = collect_moments(model, [rows] * 3 + [torch.ones(1, 1)])["0"]
    assert float(moments.gram) == 3e8 + 1  # float32 has no such number


def test_a_layer_that_runs_twice_counts_both_times():
    layer = nn.Linear(4, 4)
    x = tensor(5, 4)
    moments = collect_moments(nn.Sequential(layer, nn.Tanh(), layer), [x])["0"]
    rows = torch.cat([x, torch.tanh(layer(x))]).detach().double()
    np.testing.assert_allclose(moments.gram.numpy(), (rows.T @ rows).numpy(), rtol=1e-6)
    assert moments.rows == 10


def test_layers_can_be_chosen_and_those_that_do_not_run_are_left_out():
    model = nn.ModuleDict({"a": nn.Linear(8, 3), "b": nn.Linear(8, 3)})
    forward = lambda net, batch: net["a"](batch)  # noqa: E731
    x = tensor(6, 8)
    assert list(collect_moments(model, [x], forward=forward)) == ["a"]
    with pytest.raises(ValueError, match=r"the layers \['b'\] did not run"):
        collect_moments(model, [x], ["a", "b"], forward=forward)
    with pytest.raises(ValueError, match="no Linear or convolution layer called 'c'"):
        collect_moments(model, [x], ["c"], forward=forward)
    with pytest.raises(ValueError, match="level='pixel': expected one of"):
        collect_moments(model, [x], level="pixel", forward=forward)


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_stays_bit_for_bit(mode):
    model = small_convnet().train(mode)
    model.norm1.eval()
    before = snapshot(model)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    collect_moments(model, [IMAGES], level="patch", positions=3)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_mode_is_what_is_measured():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(8), nn.Linear(8, 2)).train()
    x = tensor(16, 8) + 5
    rows = (x / (1 + 1e-5) ** 0.5).double()
    moments = collect_moments(model, [x])["2"]
    np.testing.assert_allclose(moments.covariance(), (rows.T @ rows / 16).numpy(), rtol=1e-5)


def test_bad_numbers_are_named():
    model = small_mlp()
    x = tensor(6, 8)
    x[5, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf in the inputs of layer 'fc1'"):
        collect_moments(model, [tensor(6, 8), x])
    overflow = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1))
    with torch.no_grad():
        overflow[0].weight.fill_(1e30)
    with pytest.raises(ValueError, match="NaN or Inf in the inputs of layer '1' or in their squares"):
        collect_moments(overflow, [torch.full((2, 1), 1e10)])
    with torch.no_grad():
        model.fc2.weight[1, 1] = float("inf")
        model.fc2.weight[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"the model's 'fc2.weight' has 2 NaN or Inf entries"):
        collect_moments(model, [tensor(6, 8)])
    convnet = small_convnet()
    convnet.norm2.running_var[0] = float("nan")
    with pytest.raises(ValueError, match=r"the model's 'norm2.running_var' has 1 NaN or Inf entries"):
        collect_moments(convnet, [IMAGES])


def test_large_finite_weights_are_no_error():
    model = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.fill_(2e38)  # their sum overflows
    assert collect_moments(model, [tensor(3, 2)]).samples == 3


KINDS = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "grouped 1d": (nn.Conv1d(8, 6, 3, groups=2, padding=1), (8, 9)),
    "grouped": (nn.Conv2d(8, 6, 3, groups=2, padding=1), (8, 7, 6)),
    "3d": (nn.Conv3d(2, 3, 2), (2, 4, 3, 5)),
    "transposed": (nn.ConvTranspose2d(3, 2, 3, stride=2), (3, 4, 5)),
    "transposed 1d": (nn.ConvTranspose1d(3, 2, 3, stride=2), (3, 6)),
}


@pytest.mark.parametrize("level", ["channel", "patch"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_convolution(kind, level):
    layer, shape = KINDS[kind]
    model = nn.Sequential(layer).double()
    inputs = tensor(7, *shape, dtype=torch.float64)
    if level == "channel":
        rows = inputs.flatten(2).transpose(1, 2).reshape(-1, shape[0])
    else:
        rows = patch_rows(layer, inputs, Positions(None))
    found = collect_moments(model, [inputs[:3], inputs[3:]], level=level)["0"]
    assert found.rows == len(rows)
    torch.testing.assert_close(found.gram, rows.T @ rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.total, rows.sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("level", ["channel", "patch"])
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_half_precision_inputs_are_multiplied_in_single(how, level):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    images = tensor(40, 8, 12, 12) + 1
    seen = []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    if how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = collect_moments(model, [images], level=level)["1"]
        inputs = seen[0]
    else:
        kind = getattr(torch, how)
        found = collect_moments(model.to(kind), [images.to(kind)], level=level)["1"]
        inputs = seen[0]
    assert inputs.dtype in (torch.bfloat16, torch.float16)
    inputs = inputs.double()
    rows = channel_rows(model[1], inputs) if level == "channel" else patch_rows(model[1], inputs, Positions(None))
    scale = (rows**2).sum(0).sqrt()
    assert found.gram.dtype == found.total.dtype == torch.float64
    assert ((found.gram - rows.T @ rows).abs() / torch.outer(scale, scale)).max() < 1e-6  # half precision: 1e-3


def test_a_convolution_of_one_image_and_inputs_by_keyword():
    conv = nn.Conv2d(4, 2, 3)
    image = tensor(4, 8, 9)
    alone = collect_moments(nn.Sequential(conv), [image])["0"]
    assert alone.rows == 72
    torch.testing.assert_close(alone.gram, collect_moments(nn.Sequential(conv), [image[None]])["0"].gram)
    model = nn.ModuleDict({"a": nn.Linear(8, 3)})
    named = collect_moments(model, [tensor(6, 8)], forward=lambda net, batch: net["a"](input=batch))["a"]
    assert named.rows == 6


@pytest.mark.parametrize("level", ["channel", "patch"])
def test_bytes_of_the_moments(level):
    model = small_convnet()
    moments = collect_moments(model, [IMAGES], level=level)
    kept = sum(m.gram.untyped_storage().nbytes() + m.total.untyped_storage().nbytes() for m in moments.values())
    assert collection_bytes(model, level=level) == kept
    assert collection_bytes(model, ["fc2"]) == 8 * (moments["fc2"].total.numel() ** 2 + moments["fc2"].total.numel())
    with pytest.raises(ValueError, match="level='pixel': expected one of"):
        collection_bytes(model, level="pixel")


@pytest.mark.parametrize("level", ["channel", "patch"])
def test_collection_goes_on_from_a_file(tmp_path, level):
    model = small_convnet()
    batches = list(IMAGES.split(3))
    collect_moments(model, batches[:2], level=level).save(tmp_path / "part.npz")
    resumed = Moments.load(tmp_path / "part.npz") + collect_moments(model, batches[2:], level=level)
    whole = collect_moments(model, batches, level=level)
    assert (resumed.samples, resumed.level, list(resumed)) == (whole.samples, whole.level, list(whole))
    for name in whole:
        assert resumed[name].rows == whole[name].rows
        torch.testing.assert_close(resumed[name].gram, whole[name].gram, rtol=1e-6, atol=1e-6)


class Generated:
    """Batches made when they are read, so that only what the collector keeps takes memory."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return (tensor(50, 8, seed=k) for k in range(self.count))


def test_memory_does_not_grow_with_the_sample():
    model = small_mlp()
    few, many = collect_moments(model, Generated(2)), collect_moments(model, Generated(100))
    for name in few:
        for a, b in ((few[name].gram, many[name].gram), (few[name].total, many[name].total)):
            assert a.shape == b.shape
            assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes() == a.numel() * 8

    def peak(count):
        tracemalloc.start()
        collect_moments(model, Generated(count))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(2)
    assert peak(200) < 2 * peak(20) + 50_000  # tenfold data


def test_drawn_positions_estimate_the_moments_without_bias():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1))
    images = [tensor(4, 2, 6, 6, seed=2)]
    full = collect_moments(model, images, level="patch")["0"].covariance()
    draws = np.array(
        [collect_moments(model, images, level="patch", positions=4, seed=k)["0"].covariance() for k in range(300)]
    )
    standard_error = draws.std(0) / np.sqrt(len(draws))
    z = np.abs(draws.mean(0) - full) / np.maximum(standard_error, 1e-12)
    assert z.max() < 5
    assert np.mean(z**2) < 1.5
    assert not np.allclose(draws[0], draws[1])
    again = collect_moments(model, images, level="patch", positions=4, seed=0)["0"].covariance()
    np.testing.assert_array_equal(again, draws[0])


@pytest.fixture
def saved(tmp_path):
    moments = collect_moments(small_convnet(), [IMAGES], level="patch", positions=2)
    path = tmp_path / "moments.npz"
    moments.save(path)
    return moments, path


def same(a, b):
    return (
        (a.samples, a.level, list(a)) == (b.samples, b.level, list(b))
        and all(a[name].rows == b[name].rows for name in a)
        and all(torch.equal(a[name].gram, b[name].gram) and torch.equal(a[name].total, b[name].total) for name in a)
    )


def test_files_hold_everything(saved):
    moments, path = saved
    loaded = Moments.load(path)
    assert same(loaded, moments)
    assert (loaded + moments).samples == 20


def test_truncated_files_are_refused(saved):
    _, path = saved
    content = path.read_bytes()
    for length in [*range(0, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="not a readable specprune moments file"):
            Moments.load(path)


def test_damaged_files_are_refused_or_read_the_same(tmp_path):
    moments = collect_moments(small_mlp((3, 2, 2)), [tensor(5, 3)])
    path = tmp_path / "moments.npz"
    moments.save(path)
    content = path.read_bytes()
    refused = 0
    for k in range(len(content)):  # a flipped bit in every byte; some bytes of a zip file carry nothing, such as times
        path.write_bytes(content[:k] + bytes([content[k] ^ (1 << k % 8)]) + content[k + 1 :])
        try:
            loaded = Moments.load(path)
        except ValueError:
            refused += 1
        else:
            assert same(loaded, moments)
    assert refused > len(content) / 2


@pytest.mark.parametrize("change", ["missing", "shape", "rows", "header"])
def test_files_that_contradict_themselves_are_refused(saved, change, tmp_path):
    from specprune._files import load_arrays, save_arrays

    _, path = saved
    arrays, header = load_arrays(path, "moments")
    if change == "missing":
        del arrays["gram2"]
    elif change == "shape":
        arrays["total1"] = arrays["total1"][:-1]
    elif change == "rows":
        header["rows"].pop()
    else:
        del header["samples"]
    save_arrays(path, arrays, header)
    with pytest.raises(ValueError, match="a damaged moments file"):
        Moments.load(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        Moments.load(tmp_path / "absent.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "plain.npz", a=np.zeros(3))
    (tmp_path / "text.npz").write_text("not an archive")
    for name in ("array.npy", "plain.npz", "text.npz"):
        with pytest.raises(ValueError, match="not a readable specprune moments file"):
            Moments.load(tmp_path / name)
