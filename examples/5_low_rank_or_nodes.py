# %% [markdown]
# # 5. Low rank or nodes?
#
# Two ways to make a layer smaller: take nodes away, or replace its matrix by a product of two thin ones. Which loses
# less? It depends on what one looks at: the weights, or the data that go through them.

# %%
import matplotlib.pyplot as plt
import numpy as np

from specprune import compare, layer_spectra
from specprune.compress import low_rank
from specprune.figures.style import BLUE, GREEN, PURPLE, REFERENCE, VERMILION, figure_style
from specprune.testbed import default_recipe, load_dataset, train

data = load_dataset("digits")
batches, test = data.train_batches(), data.test_batches()
model = train(data, default_recipe("digits", "mlp-128-64")).model.double()
batches, test = ([(inputs.double(), targets) for inputs, targets in part] for part in (batches, test))
weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
w = weights["fc2.weight"]  # 64 x 128
sigma = layer_spectra(model, batches)["fc2"].covariance
mu, directions = np.linalg.eigh(sigma)
root = directions * np.sqrt(np.maximum(mu, 0)) @ directions.T  # Sigma^(1/2)

of_weights = np.linalg.svd(w, compute_uv=False)
of_outputs = np.linalg.svd(w @ root, compute_uv=False)


def left(singular_values):
    """Share of the squares beyond the first r, for r = 0, 1, ..."""
    squares = singular_values**2
    return 1 - np.concatenate([[0], np.cumsum(squares)]) / squares.sum()


ranks = np.arange(65)
with figure_style():
    figure, ax = plt.subplots(figsize=(4.6, 2.7), layout="constrained")
    ax.plot(ranks, 100 * left(of_weights), "--", color=BLUE, label="of the weights, $W$")
    ax.plot(ranks, 100 * left(of_outputs), "-", color=VERMILION, label="of the outputs, $W \\Sigma^{1/2}$")
    ax.axhline(1, **REFERENCE)
    ax.text(64, 1.15, "1 %", ha="right", fontsize=7, color="0.35")
    ax.set(yscale="log", ylim=(1e-3, 150), xlabel="rank $r$, of 64", ylabel="lost beyond rank $r$ (%)")
    ax.legend(loc="lower left")
needed = {
    name: int(np.argmax(left(values) < 0.01)) for name, values in (("weights", of_weights), ("outputs", of_outputs))
}
print(f"rank that loses less than 1 %: weights {needed['weights']}, outputs {needed['outputs']}")

# %% [markdown]
# One layer of a trained network, 128 nodes in, 64 out. The blue line: how much of its *weights* is lost when the
# matrix is cut to rank $r$. The red line: how much of its *outputs* on the training images is lost, at the best rank
# $r$.
#
# To lose less than one percent, the weights need most of the ranks, and the outputs need few. Weights in directions
# that no image uses count for the blue line, and not for the red one.

# %% [markdown]
# ## What each way costs
#
# A layer from $a$ to $b$ nodes has $a b$ weights. As two thin layers of rank $r$ it has $r (a + b)$. Without half of
# its nodes on both sides it has a quarter.
#
# **What do you expect:** below which rank does the 128 x 64 layer get smaller at all?

# %%
inputs, outputs = 128, 64
print("rank   weights   share")
for rank in (64, 43, 42, 21, 10):
    print(f"{rank:4}   {rank * (inputs + outputs):7}   {rank * (inputs + outputs) / (inputs * outputs):6.0%}")
break_even = inputs * outputs / (inputs + outputs)
print(f"break even at rank {break_even:.1f}")

# %% [markdown]
# ## Low rank of the weights
#
# The best approximation of rank $r$ to a matrix is its singular value decomposition, cut off (Eckart and Young):
#
# $$\min_{\mathrm{rank}\, V \le r} \lVert W - V \rVert_F^2 = \sum_{j > r} s_j^2 .$$

# %%
u, s, vt = np.linalg.svd(w, full_matrices=False)


def cut_weights(rank):
    """The nearest matrix of this rank."""
    return u[:, :rank] * s[:rank] @ vt[:rank]


rank = 10
gap = np.linalg.norm(w - cut_weights(rank)) ** 2
print(f"rank {rank}: squared distance {gap:.6f}, sum of the other squares {np.sum(s[rank:] ** 2):.6f}")

# %% [markdown]
# ## Low rank of what the layer computes
#
# What counts is not the distance of the weights but of the outputs, on average over the inputs $\phi$:
#
# $$\mathbb{E}\, \lVert W \phi - V \phi \rVert^2 = \lVert (W - V)\, \Sigma^{1/2} \rVert_F^2 .$$
#
# So cut the singular values of $W \Sigma^{1/2}$ instead. The best $V$ keeps the leading output directions $U_r$:
# $V = U_r U_r^\top W$ (reduced-rank regression).

# %%
u_out, s_out, _ = np.linalg.svd(w @ root)


def cut_outputs(rank):
    """The matrix of this rank whose outputs are nearest on the data."""
    return u_out[:, :rank] @ u_out[:, :rank].T @ w


def output_loss(v):
    """Share of the outputs that is lost when V takes the place of W."""
    return float(np.linalg.norm((w - v) @ root) ** 2 / np.linalg.norm(w @ root) ** 2)


print("rank   lost by the weights' SVD   lost by the outputs' SVD")
for rank in (5, 10, 20, 40):
    print(f"{rank:4}   {output_loss(cut_weights(rank)):24.3%}   {output_loss(cut_outputs(rank)):24.3%}")

# %% [markdown]
# ## Nodes
#
# Now keep $k$ of the 128 input nodes, and refit (example 2). The matrix still has rank up to 64, but $64 k$ weights
# only, **and the layer before loses $128 - k$ rows as well**. That second saving is free for nodes, and low rank does
# not have it.
#
# **What do you expect** at the same number of weights in both layers together: nodes, or rank?


# %%
def greedy(count):
    """Nodes that lose least of the outputs, one by one, and the loss that they leave."""
    chosen = []
    residual = sigma + 1e-10 * np.trace(sigma) * np.eye(len(sigma))
    for _ in range(count):
        variances = np.diag(residual).copy()
        variances[chosen] = np.inf  # what was taken has nothing left to give
        chosen.append(int(np.argmax(np.sum((w @ residual) ** 2, axis=0) / variances)))
        column = residual[:, chosen[-1]].copy()
        residual -= np.outer(column, column) / column[chosen[-1]]
    return chosen, float(np.trace(w @ residual @ w.T) / np.trace(w @ sigma @ w.T))


first = 64 * 128  # weights of the layer before
rows = []
for count in (8, 16, 24, 32, 48, 64, 96):
    rows.append(("nodes", (64 + 64) * count, greedy(count)[1]))
for rank in (5, 10, 15, 20, 30, 40):
    rows.append(("rank", first + rank * (128 + 64), output_loss(cut_outputs(rank))))
for rank in (5, 10, 20, 30, 40):
    rows.append(("weights", first + rank * (128 + 64), output_loss(cut_weights(rank))))

with figure_style():
    figure, ax = plt.subplots(figsize=(4.6, 2.7), layout="constrained")
    for kind, label, look, colour in (
        ("weights", "rank, by the weights", "o--", BLUE),
        ("rank", "rank, by the outputs", "s-", VERMILION),
        ("nodes", "nodes, refitted", "^-.", GREEN),
    ):
        points = np.array([(size, loss) for name, size, loss in rows if name == kind])
        ax.plot(points[:, 0] / 1000, 100 * points[:, 1], look, color=colour, label=label)
    ax.set(yscale="log", xlabel="weights of both layers (thousands)", ylabel="outputs of the layer lost (%)")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.1, 1.0), ncols=2)

# %% [markdown]
# Nodes win here, because the layer before shrinks too. Low rank cannot go below the 8192 weights of that layer: it
# would have to cut that one as well.
#
# ## All methods at equal size
#
# The package has many methods behind one call. Here they prune the *whole* network to the same number of parameters:
#
# - **spectral**: nodes, refitted layer by layer;
# - **fitted low rank**: ranks, each layer fitted to the original outputs;
# - **hybrid**: nodes or ranks, whichever loses less for what it saves;
# - **ALDS**: ranks by the weights alone (Liebenwein et al. 2021), made to be followed by training.
#
# **What do you expect** at half the parameters, and at a tenth?

# %%
methods = ("ALDS", "fitted low rank", "spectral", "hybrid")
comparison = compare(model, batches, test, keeps=(0.5, 0.3, 0.2, 0.1), methods=methods, measure="params", latency=False)
print(f"original: {comparison.base_error:.1%} test error")
print("parameters kept   " + "   ".join(f"{name:>15}" for name in methods))
for keep in comparison.keeps:
    found = {point.method: point.error for point in comparison.points if point.keep == keep}
    print(f"{keep:15.0%}   " + "   ".join(f"{found[name]:15.1%}" for name in methods))

with figure_style():
    figure, ax = plt.subplots(figsize=(4.6, 2.7), layout="constrained")
    for name, look, colour in zip(methods, ("o--", "s-", "^-.", "D:"), (BLUE, VERMILION, GREEN, PURPLE), strict=True):
        points = [point for point in comparison.points if point.method == name]
        sizes, distances = [100 * p.params_kept for p in points], [p.divergence for p in points]
        ax.plot(sizes, distances, look, color=colour, label=name)
    ax.set(yscale="log", xlabel="parameters kept (%)", ylabel="KL divergence from\nthe original (nats)")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.1, 1.0), ncols=2)

# %% [markdown]
# At half of the parameters everything works, even ALDS, which never looks at an image. At a tenth only the methods
# that take nodes away still work on this network. Its layers are small: where $a$ and $b$ are a hundred, a rank of
# ten costs much. In wide convolutional networks ranks do better, and the mixture best (`docs/low-rank.md`).
#
# The divergence is drawn, not the error, because it does not depend on the luck of 397 test images.

# %% [markdown]
# ## Exercises
#
# 1. For which rank does a square layer, $a = b$, get smaller?
# 2. Check Eckart and Young: draw random matrices of rank 10, and move them towards $W$ as well as you can. Do you get
#    nearer than the cut-off?
# 3. The package's `low_rank(..., method="constant")` is the plain cut-off of the weights. Compare one of its layers
#    with yours.
# 4. Can a network that has lost nodes still lose rank? Which of its layers would you try?

# %% [markdown]
# **Answer 1.** $2 a r < a^2$: for less than half of its rank.

# %%
for size in (64, 128, 1000):
    smaller = [r for r in range(1, size + 1) if 2 * size * r < size * size]
    print(f"{size} x {size}: up to rank {max(smaller)}")
    assert max(smaller) < size / 2

# %% [markdown]
# **Answer 2.** Alternating least squares from random starts: fix one thin factor, solve for the other, and so on. It
# comes down to the same distance, and never below.

# %%
generator = np.random.default_rng(0)
best_possible = np.sum(s[10:] ** 2)
reached = []
for _ in range(5):
    thin = generator.standard_normal((64, 10))
    for _ in range(300):
        other = np.linalg.lstsq(thin, w, rcond=None)[0]
        thin = np.linalg.lstsq(other.T, w.T, rcond=None)[0].T
    reached.append(float(np.linalg.norm(w - thin @ other) ** 2))
print(f"five starts reach {min(reached):.6f} to {max(reached):.6f}; Eckart and Young {best_possible:.6f}")
assert min(reached) >= best_possible * (1 - 1e-12)

# %% [markdown]
# **Answer 3.** The new layer is two layers in a row; their product is the cut-off matrix.

# %%
thin_model = low_rank(model, keep=0.4, method="constant")
(entry,) = [layer for layer in thin_model.layers if layer.layer == "fc2"]
parts = [parameter.detach().numpy() for parameter in thin_model.model.fc2.parameters() if parameter.dim() == 2]
difference = np.abs(parts[1] @ parts[0] - cut_weights(entry.rank)).max()
print(f"rank {entry.rank}: largest difference of an entry {difference:.1e}")
assert difference < 1e-10

# %% [markdown]
# **Answer 4.** Yes, where its matrix is still large against its rank; that is what "hybrid" tries. It takes the best
# of nodes, ranks and the mixture on calibration images. On the test images below that is mostly the best, but not
# always.

# %%
for keep in comparison.keeps:
    found = {point.method: point.divergence for point in comparison.points if point.keep == keep}
    spectral, fitted, hybrid = (found[name] for name in ("spectral", "fitted low rank", "hybrid"))
    print(f"{keep:4.0%}: spectral {spectral:.4f}   fitted {fitted:.4f}   hybrid {hybrid:.4f}")
    assert hybrid <= max(spectral, fitted)
