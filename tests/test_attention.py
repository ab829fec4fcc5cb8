"""Attention with separate layers computes what PyTorch's does, and its heads are found and taken out whole."""

import copy
import itertools
import os

import numpy as np
import pytest
import torch
from helpers import assert_unchanged, randomise, snapshot, tensor
from torch import nn
from torch.nn import functional

from specprune.compress.attention import HeadAttention, replace_attention
from specprune.compress.batches import CalibrationData
from specprune.compress.coupling import coupled_groups
from specprune.compress.groups import agreement_error
from specprune.compress.heads import AttentionCalls, head_groups
from specprune.compress.surgery import mask_nodes, remove_nodes
from specprune.compress.tracing import small_batch, trace

WIDE = torch.float64
TOKENS = tensor(3, 5, 24)
PATTERNS = (lambda width: np.arange((width + 1) // 2), lambda width: np.arange(0, width, 2))


def pair(**options):
    """A random `nn.MultiheadAttention` and its twin, in float64 and evaluation mode."""
    attention = randomise(nn.MultiheadAttention(12, 3, **options)).double().eval()
    return attention, HeadAttention.like(attention)


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Custom(nn.Module):
    """A network from a function and named layers."""

    def __init__(self, run, numbers=None, **layers):
        super().__init__()
        self.run = run
        vars(self).update(numbers or {})
        for name, layer in layers.items():
            setattr(self, name, layer)
        randomise(self)

    def forward(self, inputs):
        return self.run(self, inputs)


def faults(model, data, batch):
    """What `find_groups` asks of a group: removing units must be the same as zeroing the columns that read them."""

    def fault(group):
        for pattern in PATTERNS:
            keep = {group.name: pattern(group.width)}
            masked = copy.deepcopy(model)
            mask_nodes(masked, [group], keep)
            try:
                error = agreement_error(remove_nodes(model, [group], keep), masked, data, batch)
            except Exception as problem:
                return f"does not run: {problem}"
            if not error <= 1:
                return "differs"
        return ""

    return fault


def heads_of(model, batch=TOKENS, forward=None):
    """The network with `replace_attention` done, its groups of heads, and the reasons by name."""
    work = replace_attention(model).eval()
    data, batch = CalibrationData([batch], forward), small_batch(batch)
    before = snapshot(work)
    groups, skipped = head_groups(work, data, batch, trace(work, data, batch), faults(work, data, batch))
    assert_unchanged(work, before)
    return work, groups, {entry.name: entry.reason for entry in skipped}


def assert_heads_go(work, groups, batch=TOKENS, forward=None):
    """Remove units of all groups at once and compare with the same network with zeroed columns, in float64."""
    run = forward or (lambda model, inputs: model(inputs))
    wide = batch.double() if isinstance(batch, torch.Tensor) else batch
    keep = {group.name: np.arange(group.width)[1:] for group in groups}
    whole, masked = run(copy.deepcopy(work).double(), wide), copy.deepcopy(work).double()
    mask_nodes(masked, groups, keep)
    small = remove_nodes(work, groups, keep).double()
    wanted = run(masked, wide)
    torch.testing.assert_close(run(small, wide), wanted, rtol=1e-9, atol=1e-9)
    assert (whole - wanted).abs().max() > 1e-6  # the heads that went did something
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in work.parameters())
    return small


# The module


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", [None, "bool", "float", "heads", "causal"])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("layout", ["batch", "length", "unbatched"])
def test_it_computes_what_pytorch_computes(layout, padding, mask, need_weights):
    batch, length = (1 if layout == "unbatched" else 4), 5
    for bias, other in itertools.product((True, False), ({}, {"kdim": 7, "vdim": 9})):
        torch_one, own = pair(bias=bias, batch_first=layout == "batch", **other)
        inputs = [
            tensor(batch, length, width, seed=seed, dtype=WIDE)
            for seed, width in enumerate((12, other.get("kdim", 12), other.get("vdim", 12)))
        ]
        if layout == "length":
            inputs = [part.transpose(0, 1) for part in inputs]
        elif layout == "unbatched":
            inputs = [part[0] for part in inputs]
        options = {"need_weights": need_weights}
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        shapes = {"bool": causal, "causal": causal, "float": tensor(length, length, seed=5, dtype=WIDE)}
        shapes["heads"] = tensor(batch * 3, length, length, seed=6, dtype=WIDE)
        if mask is not None:
            options |= {"attn_mask": shapes[mask], "is_causal": mask == "causal"}
        if padding is not None:
            away = torch.zeros(batch, length, dtype=torch.bool)
            away[:, -1] = True
            away = away if padding == "bool" else tensor(batch, length, seed=7, dtype=WIDE)
            if padding == "bool" and mask in ("float", "heads"):  # PyTorch wants one kind
                away = torch.zeros(batch, length, dtype=WIDE).masked_fill(away, -torch.inf)
            elif padding == "float" and mask in ("bool", "causal"):
                options["attn_mask"] = torch.zeros(length, length, dtype=WIDE).masked_fill(causal, -torch.inf)
            options["key_padding_mask"] = away[0] if layout == "unbatched" else away
        assert_same(own(*inputs, **options), torch_one(*inputs, **options))
        options["average_attn_weights"] = False
        assert_same(own(*inputs, **options), torch_one(*inputs, **options))


def test_keys_may_be_longer_than_queries():
    torch_one, own = pair(batch_first=True)
    query, key = tensor(2, 4, 12, dtype=WIDE), tensor(2, 6, 12, seed=1, dtype=WIDE)
    assert_same(own(query, key, key), torch_one(query, key, key))
    assert_same(own(query, key, key, need_weights=False), torch_one(query, key, key, need_weights=False))


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_only_while_training(need_weights):
    _, own = pair(dropout=0.5, batch_first=True)
    x = tensor(2, 6, 12, dtype=WIDE)

    def run(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return own(x, x, x, need_weights=need_weights)[0]

    assert torch.equal(run(0), run(1))
    own.train()
    assert not torch.allclose(run(0), run(1))


def test_the_inner_width_may_differ_from_the_embedding():
    own = HeadAttention(12, num_heads=2, head_dim=5, batch_first=True)
    x = tensor(2, 6, 12)
    assert own(x, x, x)[0].shape == (2, 6, 12)
    assert own.out_proj.weight.shape == (12, 10)


def test_what_it_refuses():
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=True"):
            pair(**options)
    _, own = pair(batch_first=True)
    x = tensor(2, 6, 12, dtype=WIDE)
    with pytest.raises(ValueError, match="pass the causal mask"):
        own(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match=r"shape \(5, 6\), expected \(6, 6\) or \(6, 6, 6\)"):
        own(x, x, x, attn_mask=torch.zeros(5, 6, dtype=WIDE))
    with pytest.raises(ValueError, match=r"shape \(2, 5\), expected \(2, 6\)"):
        own(x, x, x, key_padding_mask=torch.zeros(2, 5, dtype=WIDE))
    with pytest.raises(ValueError, match="3 dimensions"):
        own(x, x[0], x[0])


# Replacing


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_gives_the_same_outputs(norm_first, batch_first):
    layer = nn.TransformerEncoderLayer(24, 4, 20, norm_first=norm_first, batch_first=batch_first)
    model = randomise(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first and batch_first)).double()
    before = snapshot(model)
    x = TOKENS.double()
    away = torch.zeros(x.shape[:2] if batch_first else x.shape[1::-1], dtype=torch.bool)
    away[0, -1] = True
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            model.eval()
            own = replace_attention(model)
            assert isinstance(own.layers[1].self_attn, HeadAttention)
            torch.testing.assert_close(own(x), model(x))
            found, wanted = own(x, src_key_padding_mask=away), model(x, src_key_padding_mask=away)
            seen = ~(away if batch_first else away.T)  # at padded positions PyTorch itself has two answers
            torch.testing.assert_close(found[seen], wanted[seen])
    assert_unchanged(model.train(), before)


def test_a_decoder_gives_the_same_outputs():
    model = randomise(nn.Transformer(24, 4, 1, 2, 20, batch_first=True)).double().eval()
    own = replace_attention(model)
    assert sum(isinstance(module, HeadAttention) for module in own.modules()) == 5
    assert not any(isinstance(module, nn.MultiheadAttention) for module in own.modules())
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=WIDE)
    source, target = TOKENS.double(), tensor(3, 4, 24, seed=1, dtype=WIDE)
    options = {"tgt_mask": causal, "tgt_is_causal": True}
    torch.testing.assert_close(own(source, target, **options), model(source, target, **options))


def test_names_modes_flags_and_shared_modules_stay():
    attention = nn.MultiheadAttention(12, 3).eval()
    attention.in_proj_weight.requires_grad_(False)
    model = nn.ModuleDict({"a": attention, "b": attention, "c": nn.MultiheadAttention(12, 3, dtype=WIDE)})
    own = replace_attention(model)
    assert list(own) == ["a", "b", "c"]
    assert own["a"] is own["b"]
    assert not own["a"].training
    assert own["c"].training
    assert own["c"].k_proj.weight.dtype == WIDE
    assert [layer.weight.requires_grad for layer in (own["a"].q_proj, own["a"].out_proj)] == [False, True]
    assert isinstance(replace_attention(attention), HeadAttention)


def test_attention_that_cannot_be_expressed_stays():
    class Other(nn.MultiheadAttention):
        pass

    hooked, tied = nn.MultiheadAttention(12, 3), nn.MultiheadAttention(12, 3)
    hooked.register_forward_hook(lambda *_: None)
    twin = nn.MultiheadAttention(12, 3)
    twin.in_proj_weight = tied.in_proj_weight
    odd = nn.MultiheadAttention(12, 3, add_bias_kv=True), nn.MultiheadAttention(12, 3, add_zero_attn=True)
    model = nn.ModuleList([Other(12, 3), hooked, tied, twin, *odd])
    assert [type(module) for module in replace_attention(model)] == [type(module) for module in model]


def test_a_pruned_network_is_rebuilt_from_its_factory():
    def factory():
        return nn.TransformerEncoderLayer(24, 4, 20, batch_first=True)

    work, groups, _ = heads_of(randomise(factory()))
    keep = {groups[0].name: [0, 3]}
    small = remove_nodes(work, groups, keep)
    again = remove_nodes(replace_attention(factory()), groups, keep).eval()
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(TOKENS), small(TOKENS))


# Groups of heads


def split(features, heads):
    return features.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(net, q, k, v, **options):
    return net.out(functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2))


def four(width=24, keys=None):
    keys = width if keys is None else keys
    return {"q": nn.Linear(24, width), "k": nn.Linear(24, keys), "v": nn.Linear(24, keys), "out": nn.Linear(width, 6)}


def rows(*shape):
    return np.arange(int(np.prod(shape))).reshape(shape)


@pytest.mark.parametrize("need_weights", [True, False])
def test_heads_of_multihead_attention(need_weights):
    net = Custom(
        lambda net, x: net.last(net.attention(x, x, x, need_weights=need_weights)[0]),
        attention=nn.MultiheadAttention(24, 4, batch_first=True),
        last=nn.Linear(24, 6),
    )
    work, (group,), skipped = heads_of(net)
    assert skipped == {}
    assert (group.name, group.kind, group.width) == ("attention.v_proj", "heads", 4)
    assert [entry.module for entry in group.producers] == [f"attention.{part}_proj" for part in "qkv"]
    assert [entry.module for entry in group.consumers] == ["attention.out_proj"]
    for entry in (*group.producers, *group.consumers):
        np.testing.assert_array_equal(entry.index, rows(4, 6))
    assert [(entry.module, entry.name, entry.per_unit) for entry in group.attributes] == [("attention", "num_heads", 1)]
    small = assert_heads_go(work, [group])
    assert (small.attention.num_heads, small.attention.v_proj.out_features) == (3, 18)


@pytest.mark.parametrize("norm_first", [True, False])
def test_heads_of_a_transformer(norm_first):
    layer = nn.TransformerEncoderLayer(24, 4, 20, norm_first=norm_first, batch_first=True)
    model = randomise(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    work, groups, skipped = heads_of(model)
    assert [group.name for group in groups] == [f"layers.{k}.self_attn.v_proj" for k in range(2)]
    assert skipped == {}
    assert_heads_go(work, groups)


def test_heads_of_cross_attention():
    layer = randomise(nn.TransformerDecoderLayer(24, 4, 20, batch_first=True))
    batch = {"tgt": tensor(3, 4, 24, seed=1, dtype=WIDE), "memory": TOKENS.double()}
    work, groups, _ = heads_of(layer.double(), batch)
    assert [group.name for group in groups] == ["self_attn.v_proj", "multihead_attn.v_proj"]
    assert_heads_go(work, groups, batch, lambda model, batch: model(**batch))


def test_separate_projections_need_no_attribute():
    def run(net, x):
        return attend(net, *(part.unflatten(-1, (-1, 6)).transpose(1, 2) for part in (net.q(x), net.k(x), net.v(x))))

    work, (group,), _ = heads_of(Custom(run, **four()))
    assert (group.name, group.width, group.attributes) == ("v", 4, ())
    assert_heads_go(work, [group])


def test_heads_counted_by_an_attribute():
    def run(net, x):
        return attend(net, *(split(layer(x), net.n_head) for layer in (net.q, net.k, net.v)), scale=0.4)

    numbers = {"n_head": 4, "depth": 4, "heads": 8}  # the last one counts something else
    work, (group,), _ = heads_of(Custom(run, numbers, **four()))
    assert [(entry.name, entry.per_unit) for entry in group.attributes] == [("n_head", 1)]
    small = assert_heads_go(work, [group])
    assert (small.n_head, small.depth, small.heads) == (3, 4, 8)


@pytest.mark.parametrize("layout", ["parts first", "heads first"])
def test_one_layer_for_queries_keys_and_values(layout):
    def run(net, x):
        shape, where = ((3, -1, 6), -3) if layout == "parts first" else ((-1, 3, 6), -2)
        q, k, v = (part.transpose(1, 2) for part in net.qkv(x).unflatten(-1, shape).unbind(where))
        return attend(net, q, k, v)

    work, (group,), _ = heads_of(Custom(run, qkv=nn.Linear(24, 72), out=nn.Linear(24, 6)))
    (entry,) = group.producers
    wanted = rows(3, 4, 6).swapaxes(0, 1) if layout == "parts first" else rows(4, 3, 6)
    assert (group.name, entry.module) == ("qkv", "qkv")
    np.testing.assert_array_equal(entry.index, wanted.reshape(4, 18))
    assert_heads_go(work, [group])


def test_a_width_that_splits_the_features():
    def run(net, x):
        parts = net.qkv(x).split(net.inner_dim, dim=-1)
        return attend(net, *(split(part, net.heads) for part in parts))

    numbers = {"inner_dim": 24, "heads": 4}
    work, (group,), _ = heads_of(Custom(run, numbers, qkv=nn.Linear(24, 72), out=nn.Linear(24, 6)))
    assert {(entry.name, entry.per_unit) for entry in group.attributes} == {("heads", 1), ("inner_dim", 6)}
    assert_heads_go(work, [group])


@pytest.mark.parametrize("how", ["repeat", "expand", "enable_gqa", "tile"])
def test_grouped_queries_go_with_their_keys(how):
    def run(net, x):
        q, k, v = split(net.q(x), net.num_heads), split(net.k(x), net.num_kv_heads), split(net.v(x), net.num_kv_heads)
        if how == "repeat":
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        elif how == "expand":
            k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for part in (k, v))
        elif how == "tile":
            k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
        return attend(net, q, k, v, enable_gqa=how == "enable_gqa")

    numbers = {"num_heads": 6, "num_kv_heads": 3}
    work, (group,), _ = heads_of(Custom(run, numbers, **four(24, 12)))
    queries = rows(2, 3, 4).swapaxes(0, 1) if how == "tile" else rows(3, 2, 4)
    index = {entry.module: entry.index for entry in (*group.producers, *group.consumers)}
    for name in ("q", "out"):
        np.testing.assert_array_equal(index[name], queries.reshape(3, 8))
    for name in ("k", "v"):
        np.testing.assert_array_equal(index[name], rows(3, 4))
    assert {(entry.name, entry.per_unit) for entry in group.attributes} == {("num_heads", 2), ("num_kv_heads", 1)}
    assert_heads_go(work, [group])


def rotated(x):
    """Rotary embedding in the two-halves convention."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / 10 ** torch.arange(half, dtype=x.dtype)
    cos, sin = torch.cos(angle).repeat(1, 2), torch.sin(angle).repeat(1, 2)
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def test_rotary_embedding_and_norms_of_heads():
    def run(net, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        return attend(net, rotated(net.norm(q)), rotated(net.norm(k)), v, is_causal=True)

    work, (group,), _ = heads_of(Custom(run, norm=nn.LayerNorm(6), **four()))
    assert group.width == 4
    assert_heads_go(work, [group])


def test_two_layers_read_the_result_and_activations_write_in_place():
    def run(net, x):
        q, k, v = (layer(x).tanh_().unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        result = functional.scaled_dot_product_attention(query=q, key=k, value=v).transpose(1, 2).flatten(2)
        result.mul_(2).tanh_()
        return net.out(result) + net.gate(result)

    work, (group,), _ = heads_of(Custom(run, gate=nn.Linear(24, 6), **four()))
    assert [entry.module for entry in group.consumers] == ["out", "gate"]
    assert_heads_go(work, [group])


def test_chunks_of_one_attention_are_one_group():
    def run(net, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        chunks = [functional.scaled_dot_product_attention(part, k, v) for part in q.split(2, dim=2)]
        return net.out(torch.cat(chunks, 2).transpose(1, 2).flatten(2))

    work, (group,), skipped = heads_of(Custom(run, **four()))
    assert skipped == {}
    assert_heads_go(work, [group])


def test_what_is_left_whole_and_why():
    def plain(net, x):
        return attend(net, *(layer(x).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (net.q, net.k, net.v)))

    def hard_coded(net, x):
        return attend(net, *(layer(x).view(*x.shape[:2], 4, 6).transpose(1, 2) for layer in (net.q, net.k, net.v)))

    def one_head(net, x):
        return attend(net, *(split(layer(x), 1) for layer in (net.q, net.k, net.v)))

    def one_key(net, x):
        k, v = (split(layer(x), 1).expand(-1, 4, -1, -1) for layer in (net.k, net.v))
        return attend(net, split(net.q(x), 4), k, v)

    def normed(net, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        return net.out(net.norm(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))

    def leaking(net, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        return attend(net, q, k, v) + v.mean()

    def twice(net, x):
        return plain(net, x) + net.out(net.v(x))

    def bare(net, x):
        return functional.scaled_dot_product_attention(*(split(layer(x), 4) for layer in (net.q, net.k, net.v)))

    def convolved(net, x):
        q, k, v = (split(part, 4) for part in net.conv(x.transpose(1, 2)).transpose(1, 2).chunk(3, -1))
        return attend(net, q, k, v)

    frozen = Custom(plain, **four())
    frozen.k.weight.requires_grad_(False)
    conv = {"conv": nn.Conv1d(24, 72, 1), "out": nn.Linear(24, 6)}
    for model, name, reason in (
        (Custom(hard_coded, **four()), "v", "does not run"),
        (Custom(hard_coded, {"num_heads": 4}, **four()), "v", "does not run.*num_heads"),
        (Custom(one_head, **four()), "v", "one head"),
        (Custom(one_key, **four(24, 6)), "v", "all 4 heads share features of 'k', 'v'"),
        (Custom(normed, norm=nn.LayerNorm(24), **four()), "v", "all 4 heads share features of 'out'"),
        (Custom(leaking, **four()), "v", "differs"),
        (Custom(twice, **four()), "v", "'v' runs more than once.*'out' runs more than once"),
        (Custom(bare, **four()), "v", "no Linear layer reads"),
        (Custom(convolved, **conv), "conv", "no Linear layer makes the queries; 'conv' does"),
        (frozen, "v", "k.weight.*frozen"),
    ):
        _, groups, skipped = heads_of(model)
        assert groups == [], reason
        assert list(skipped) == [name]
        with pytest.raises(AssertionError, match=reason):  # the reason is what a reader of the report sees
            raise AssertionError(skipped[name])


def test_attention_of_another_kind_is_named():
    net = Custom(lambda net, x: net.attention(x, x, x)[0], attention=nn.MultiheadAttention(24, 4, add_bias_kv=True))
    _, groups, skipped = heads_of(net)
    assert groups == []
    assert "extra keys" in skipped["attention"]


# Hugging Face


@pytest.fixture(scope="module")
def transformers():
    os.environ["HF_HUB_OFFLINE"] = "1"
    return pytest.importorskip("transformers")


def bert(transformers):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)
    return transformers.BertForSequenceClassification(config)


def gpt2(transformers):
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama(transformers):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 20}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(vocab_size=50, max_position_embeddings=16, **sizes, **heads)
    return transformers.LlamaForCausalLM(config)


def logits(model, batch):
    return model(**batch).logits


@pytest.mark.parametrize(
    ("factory", "names", "nodes"),
    [
        (bert, "bert.encoder.layer.{}.attention.self.value", "bert.encoder.layer.{}.intermediate.dense"),
        (gpt2, "transformer.h.{}.attn.c_attn", "transformer.h.{}.mlp.c_fc"),
        (llama, "model.layers.{}.self_attn.v_proj", "model.layers.{}.mlp.gate_proj"),
    ],
)
def test_hugging_face_models(transformers, factory, names, nodes):
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    batch = {"input_ids": torch.arange(21).reshape(3, 7), "attention_mask": mask}
    model = randomise(factory(transformers)).eval()
    work, groups, skipped = heads_of(model, batch, logits)
    torch.testing.assert_close(logits(work, batch), logits(model, batch), rtol=1e-4, atol=1e-5)
    assert [group.name for group in groups] == [names.format(k) for k in range(2)]
    assert [group.width for group in groups] == [4, 4]
    assert skipped == {}

    def cut(model, batch):
        with AttentionCalls():
            return logits(model, batch)

    small, data = small_batch(batch), CalibrationData([batch], cut)
    hidden = [
        group
        for group in coupled_groups(work, data, small, trace(work, data, small))[0]
        if "attention" not in group.name
    ]
    assert {nodes.format(k) for k in range(2)} <= {group.name for group in hidden}
    assert_heads_go(work, [*groups, *hidden], batch, logits)
