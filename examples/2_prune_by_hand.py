# %% [markdown]
# # 2. Prune a network by hand
#
# A trained layer has 128 nodes. We keep 16 of them, and refit what reads them, with a few lines of NumPy. Then we
# check that the package does the same.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

from specprune import prune
from specprune.compress import NodeStatistics, information_losses
from specprune.figures.style import BLUE, GREEN, PURPLE, VERMILION, figure_style
from specprune.testbed import default_recipe, evaluate, load_dataset, train

data = load_dataset("digits")
model = train(data, default_recipe("digits", "mlp-128-64")).model.double()  # to compare many digits later
batches = [(data.train_inputs.double(), data.train_targets)]
test_batches = [(data.test_inputs.double(), data.test_targets)]
sizes = (4, 8, 16, 32, 64, 128)
rules = {
    "random, cut": {"selection": "random", "reconstruction": "none"},
    "large weights, cut": {"selection": "magnitude", "reconstruction": "none"},
    "random, refit": {"selection": "random", "reconstruction": "channel"},
    "greedy, refit": {"selection": "greedy", "reconstruction": "channel"},
}
errors = {
    rule: [evaluate(prune(model, batches, widths={"fc1": size}, **how).model, test_batches)[0] for size in sizes]
    for rule, how in rules.items()
}

with figure_style():
    figure, ax = plt.subplots(figsize=(4.6, 2.8), layout="constrained")
    looks = (("o", ":", PURPLE), ("^", "-.", GREEN), ("s", "--", BLUE), ("D", "-", VERMILION))
    for (rule, values), (marker, line, colour) in zip(errors.items(), looks, strict=True):
        ax.plot(sizes, 100 * np.array(values), marker=marker, linestyle=line, color=colour, label=rule)
    ax.set(xscale="log", xlabel="nodes kept, of 128", ylabel="test error (%)", ylim=(0, 100))
    ax.set_xticks(sizes, sizes)
    ax.minorticks_off()
    ax.legend(loc="upper right")

# %% [markdown]
# Two things help: choosing the nodes well, and **refitting** the layer that reads them. The refit helps more. Here is
# where both come from.

# %% [markdown]
# ## Step 1: the second moments
#
# Let $\phi(x) \in \mathbb{R}^{m}$ be the outputs of the $m = 128$ nodes, after the ReLU, as the next layer reads
# them. All we need to know about them is
#
# $$\Sigma = \frac1n \sum_{i=1}^n \phi(x_i)\, \phi(x_i)^\top .$$

# %%
images = data.train_inputs.flatten(1).double().numpy()
weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def nodes(x):
    """Outputs of the first hidden layer, one row an image."""
    return np.maximum(x @ weights["fc1.weight"].T + weights["fc1.bias"], 0)


phi = nodes(images)
m = phi.shape[1]
sigma = phi.T @ phi / len(phi)
print(f"{len(phi)} images, Sigma is {sigma.shape[0]} x {sigma.shape[1]}, Tr Sigma = {np.trace(sigma):.2f}")

# %% [markdown]
# ## Step 2: rebuild all nodes from a few
#
# Keep the nodes $J$. Which linear map $A$ makes $A\,\phi_J$ as near to $\phi$ as possible? That is a regression of
# all nodes on the kept ones, with a small ridge so that nothing is divided by zero:
#
# $$A_J = \Sigma_{F J}\,(\Sigma_{JJ} + I_\tau)^{-1}, \qquad F = \{1, \dots, m\}.$$
#
# The ridge of node $j$ is $\tau_j = \lambda\, |J|\, q_j$ with its leverage score $q_j$ (example 1): a node that
# carries much may be used less freely. With $\lambda$ as small as here, it hardly matters.

# %%
lam = 1e-6 * np.trace(sigma)
share = np.diag(sigma @ np.linalg.inv(sigma + lam * np.eye(m)))
leverage = np.maximum(share / share.sum(), 1e-18)  # a node that never fires has none; nothing is divided by zero


def mix(kept, size=None):
    """A_J of the kept nodes; the ridge is that of a set of `size` nodes, or of these."""
    tau = lam * (size or len(kept)) * leverage[kept]
    return np.linalg.solve(sigma[np.ix_(kept, kept)] + np.diag(tau), sigma[kept, :]).T


first = np.arange(16)
a_first = mix(first)
print(f"A_J is {a_first.shape[0]} x {a_first.shape[1]}")

# %% [markdown]
# ## Step 3: what is lost
#
# What the kept nodes do not tell about all nodes is the residual
# $R = \Sigma - \Sigma_{FJ} (\Sigma_{JJ} + I_\tau)^{-1} \Sigma_{JF}$.
#
# The next layer multiplies by its weights $W$. So the loss that counts is the **output loss**
#
# $$L_B(J) = \frac{\mathrm{Tr}\, W R\, W^\top}{\mathrm{Tr}\, W \Sigma W^\top} \in [0, 1].$$
#
# **What do you expect:** is the loss of the first 16 nodes about 16/128 better than nothing, or much better?

# %%
w = weights["fc2.weight"]


def output_loss(kept, size=None):
    """Share of the next layer's inputs that the kept nodes do not tell."""
    residual = sigma - mix(kept, size) @ sigma[kept, :]
    return float(np.trace(w @ residual @ w.T) / np.trace(w @ sigma @ w.T))


print(f"loss of the first 16 nodes: {output_loss(first):.4f}")

# %% [markdown]
# Much better: 16 nodes of 128, not even chosen, tell nearly everything. The nodes repeat each other; example 1
# counted about ten degrees of freedom.
#
# ## Step 4: choose the nodes
#
# All sets of 16 nodes of 128 are about $10^{20}$: too many. **Greedy** takes the best node, then the one that helps
# it most, and so on. Each step tries every node that is left.

# %%
keep = 16
chosen: list[int] = []
path = []
for _ in range(keep):
    losses = {j: output_loss([*chosen, j], keep) for j in range(m) if j not in chosen}
    best = min(losses, key=losses.get)
    chosen.append(best)
    path.append(losses[best])
chosen = sorted(chosen)
print(f"greedy chose {chosen}")
print(f"loss: greedy {output_loss(chosen):.5f}, the first 16 nodes {output_loss(first):.5f}")

with figure_style():
    figure, ax = plt.subplots(figsize=(3.4, 2.2), layout="constrained")
    random_sets = [np.random.default_rng(seed).permutation(m) for seed in range(10)]
    for seed, order in enumerate(random_sets):
        values = [output_loss(order[:size], keep) for size in range(1, keep + 1)]
        ax.plot(range(1, keep + 1), values, color="0.7", linewidth=0.8, label="random" if seed == 0 else None)
    ax.plot(range(1, keep + 1), path, "o-", color=BLUE, label="greedy")
    ax.set(yscale="log", xlabel="nodes kept, of 128", ylabel="output loss $L_B$")
    ax.legend(loc="upper right")

# %% [markdown]
# ## Step 5: fold the map into the next layer
#
# The next layer computed $W \phi + b$. Now it computes $W A_J\, \phi_J + b$. So its new weights are $W^\# = W A_J$,
# and the small network is an ordinary one: 16 nodes, and a matrix of 64 x 16.

# %%
kept = np.array(chosen)
w_small = w @ mix(kept)


def small_network(x):
    """The pruned network, by hand."""
    hidden = np.maximum(nodes(x)[:, kept] @ w_small.T + weights["fc2.bias"], 0)
    return hidden @ weights["fc3.weight"].T + weights["fc3.bias"]


test_images = data.test_inputs.flatten(1).double().numpy()
targets = data.test_targets.numpy()
error_small = float(np.mean(small_network(test_images).argmax(1) != targets))
error_full, _ = evaluate(model, test_batches)
print(f"test error: 128 nodes {error_full:.1%}, 16 nodes {error_small:.1%}")

# %% [markdown]
# ## The package does the same
#
# `prune` with the paper's rule ("greedy") and the paper's map ("channel"), and the same $\lambda$:

# %%
pruned = prune(model, batches, widths={"fc1": keep}, selection="greedy", reconstruction="channel", lam=1e-6)
(report,) = [group for group in pruned.report.groups if group.group == "fc1"]
with torch.no_grad():
    difference = np.abs(pruned.model(data.test_inputs.double()).numpy() - small_network(test_images))
relative = float(difference.max() / np.abs(small_network(test_images)).max())
same_nodes = np.array_equal(pruned.nodes["fc1"].indices, kept)
print(f"same nodes: {same_nodes}")
print(f"output loss: package {report.output_loss:.8f}, by hand {output_loss(kept):.8f}")
print(f"largest difference of the outputs, relative: {relative:.1e}")
assert same_nodes
assert np.isclose(report.output_loss, output_loss(kept), rtol=1e-6)
assert relative < 1e-9

# %% [markdown]
# The paper's map leaves the bias $b$ alone. The package's own refit ("sequential", the default) also fits the
# constant, and it refits each layer on what the pruned layers before it really give. **What do you expect** of the
# same 16 nodes?

# %%
refitted = prune(model, batches, widths={"fc1": keep}, selection="greedy").model
default = prune(model, batches, widths={"fc1": keep}).model


def distance(network):
    """Root mean square distance of the test outputs from the original network's, relative to their size."""
    with torch.no_grad():
        original, other = (net(test_batches[0][0]) for net in (model, network))
    return float((original - other).square().mean().sqrt() / original.square().mean().sqrt())


print("                           distance   test error")
for name, network in (
    ("greedy, the paper's map", pruned.model),
    ("greedy, refit", refitted),
    ("backward, refit (default)", default),
):
    print(f"{name:25}  {distance(network):8.2%}   {evaluate(network, test_batches)[0]:10.1%}")
print(f"{'not pruned':25}  {0:8.2%}   {error_full:10.1%}")

# %% [markdown]
# The same nodes come nearer. The default rule takes nodes away one by one instead of adding them; on this small
# network that gains nothing. Test errors differ by a few of 397 images: pruning aims at what the network computes,
# not at labels.
#
# ## Exercises
#
# 1. Check that $L_B$ is what it says: compute the mean square of $W \phi - W A_J \phi_J$ over the images, and compare
#    it with $\mathrm{Tr}\, W R\, W^\top$ when there is hardly any ridge.
# 2. Keep all nodes but with $J$ in another order. What is $A_J$?
# 3. Swap one chosen node for one that is not chosen, in all ways. Is greedy's set the best of these?
# 4. Do you need labels for any of this?

# %% [markdown]
# **Answer 1.** Ridge regression minimises the mean square *plus* its penalty, and the minimum is the residual:
#
# $$\frac1n \sum_i \lVert W \phi(x_i) - W^\# \phi_J(x_i) \rVert^2 + \sum_{j \in J} \tau_j \lVert W^\#_{\cdot j} \rVert^2
#   = \mathrm{Tr}\, W R\, W^\top .$$
#
# So the loss is never below the mean square, and hardly above it.

# %%
square = float(np.mean(np.sum((phi @ w.T - phi[:, kept] @ w_small.T) ** 2, axis=1)))
penalty = float(np.sum(lam * keep * leverage[kept] * np.sum(w_small**2, axis=0)))
total = float(np.mean(np.sum((phi @ w.T) ** 2, axis=1)))
print(f"mean square {square / total:.8f} + penalty {penalty / total:.8f} = {(square + penalty) / total:.8f}")
print(f"output loss {output_loss(kept):.8f}")
assert square / total <= output_loss(kept)
assert np.isclose((square + penalty) / total, output_loss(kept), rtol=1e-8)

# %% [markdown]
# **Answer 2.** A permutation matrix, up to the ridge: each node is rebuilt from itself. Nodes that never fire are
# left out here; there is nothing to rebuild.

# %%
alive = np.flatnonzero(np.diag(sigma) > 0)
order = np.random.default_rng(0).permutation(alive)
rebuilt = phi[:, order] @ mix(order).T
left = np.mean((phi - rebuilt) ** 2) / np.mean(phi**2)
own = np.mean([mix(order)[node, place] for place, node in enumerate(order)])
print(f"share of the energy that is not rebuilt: {left:.1e}; mean weight of a node on itself: {own:.3f}")
assert left < 1e-4

# %% [markdown]
# **Answer 3.** Greedy is not optimal in general: its gains do not even shrink from step to step as those of a
# submodular function would. Swaps may find better sets.

# %%
swaps = {
    (out, new): output_loss([*(j for j in chosen if j != out), new])
    for out in chosen
    for new in range(m)
    if new not in chosen
}
(out, new), best_swap = min(swaps.items(), key=lambda item: item[1])
better = sum(value < output_loss(chosen) for value in swaps.values())
print(f"{better} of {len(swaps)} swaps are better; the best ({out} for {new}) has {best_swap:.5f}")
assert best_swap > 0.5 * output_loss(chosen)

# %% [markdown]
# **Answer 4.** No: $\Sigma$ and $W$ know nothing of labels. Any images of the right kind will do. With the package,
# leave the labels out of the batches.

# %%
unlabelled = prune(
    model, [data.train_inputs.double()], widths={"fc1": keep}, selection="greedy", reconstruction="channel"
)
assert np.array_equal(unlabelled.nodes["fc1"].indices, kept)
statistics = NodeStatistics(sigma, w.T @ w, np.linalg.norm(weights["fc1.weight"], axis=1))
_, loss = information_losses(statistics, unlabelled.nodes["fc1"], lam)
print(f"without labels: the same nodes, output loss {loss:.8f}")
assert np.isclose(loss, output_loss(kept))
