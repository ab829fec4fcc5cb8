# %% [markdown]
# # 1. What is a degree of freedom?
#
# A layer of 128 nodes can fill 128 dimensions. It rarely does. This page counts the dimensions that it really uses,
# first for clouds of points in the plane, then for a trained network.

# %%
import matplotlib.pyplot as plt
import numpy as np

from specprune import layer_spectra
from specprune.bounds import degrees_of_freedom, inverse_degrees_of_freedom
from specprune.figures.style import BLUE, GREEN, LINE_STYLES, REFERENCE, VERMILION, figure_style
from specprune.testbed import default_recipe, initial_network, load_dataset, train

noise = 0.05  # lambda, the square of the noise's size
normal = np.random.default_rng(0).standard_normal((400, 2))
clouds = {"round": normal * [1.0, 1.0], "flat": normal * [1.0, 0.25], "line": normal * [1.0, 0.02]}

with figure_style():
    figure, axes = plt.subplots(1, 3, figsize=(7.0, 2.7), layout="constrained", sharex=True, sharey=True)
    for ax, (name, points) in zip(axes, clouds.items(), strict=True):
        mu = np.linalg.eigvalsh(points.T @ points / len(points))
        ax.plot(*points.T, ".", color=BLUE, markersize=2)
        ax.add_patch(plt.Circle((0, 0), np.sqrt(noise), color=VERMILION, fill=False, linewidth=1.5, zorder=3))
        ax.set_title(f"{name}: {np.sum(mu / (mu + noise)):.2f} degrees of freedom")
        ax.set(aspect="equal", xlabel="output of node 1")
    axes[0].set_ylabel("output of node 2")

# %% [markdown]
# Each dot is what two nodes say about one input. The red circle is the size of the noise, $\sqrt\lambda$.
#
# A direction in which the cloud is much longer than the circle counts as one. A direction in which it is much shorter
# counts as nothing. In between it counts in part. That sum is the number of **degrees of freedom**.

# %% [markdown]
# ## The formula
#
# Let $\phi$ be the vector of the nodes' outputs and $\Sigma = \frac1n \sum_i \phi_i \phi_i^\top$ their second
# moments. The eigenvalues $\mu_1 \ge \mu_2 \ge \dots$ of $\Sigma$ are the squared lengths of the cloud. Then
#
# $$N(\lambda) = \sum_j \frac{\mu_j}{\mu_j + \lambda} = \mathrm{Tr}\, \Sigma (\Sigma + \lambda I)^{-1}.$$


# %%
def count(covariance, lam):
    """N(lambda), written as it stands."""
    mu = np.linalg.eigvalsh(covariance)
    return float(np.sum(mu / (mu + lam)))


flat = clouds["flat"]
covariance = flat.T @ flat / len(flat)
by_hand = count(covariance, noise)
by_package = degrees_of_freedom(np.linalg.eigvalsh(covariance), noise)
print(f"by hand {by_hand:.6f}   package {by_package:.6f}")

# %% [markdown]
# ## One direction is a soft switch
#
# What do you expect of $\mu / (\mu + \lambda)$ at $\mu = \lambda$? And at $\mu = 10 \lambda$?

# %%
ratio = np.logspace(-3, 3, 200)
with figure_style():
    figure, ax = plt.subplots(figsize=(3.4, 2.2), layout="constrained")
    ax.plot(ratio, ratio / (ratio + 1), color=BLUE)
    for x in (0.1, 1, 10):
        ax.plot(x, x / (x + 1), "o", color=VERMILION)
        ax.annotate(f"{x / (x + 1):.2f}", (x, x / (x + 1)), xytext=(6, -8), textcoords="offset points", fontsize=7)
    ax.set(xscale="log", xlabel="eigenvalue / noise,  $\\mu / \\lambda$", ylabel="counts as")

# %% [markdown]
# ## Where the formula comes from
#
# Fit any target $y$ by ridge regression on the nodes: the fitted values are $\hat y = H y$ with
# $H = \Phi (\Phi^\top \Phi + n \lambda I)^{-1} \Phi^\top$.
#
# A fit that follows the target point by point has $\mathrm{Tr}\, H$ equal to the number of its parameters. With a
# ridge it follows less, and $\mathrm{Tr}\, H = N(\lambda)$ is what is left of the parameters.

# %%
hat = flat @ np.linalg.solve(flat.T @ flat + len(flat) * noise * np.eye(2), flat.T)
print(f"Tr H = {np.trace(hat):.6f}   N = {by_hand:.6f}")

# %% [markdown]
# ## A trained network
#
# A small network learns the digits that come with the package: 64 pixels, hidden layers of 128 and 64 nodes, 10
# classes.
#
# **What do you expect?** Layer `fc2` reads 128 nodes. Take $\lambda$ at one percent of all their energy,
# $\lambda = 0.01\,\mathrm{Tr}\,\Sigma$. How many of 128 dimensions stand above that noise: about 10, about 50, or
# more than 100? Write a number down.

# %%
data = load_dataset("digits")
trained = train(data, default_recipe("digits", "mlp-128-64"))
spectra = layer_spectra(trained.model, data.train_batches())
print("layer  nodes  N(0.01 Tr)  N(0.0001 Tr)")
for name, layer in spectra.items():
    print(f"{name:5}  {layer.width:5}  {layer.degrees_of_freedom(1e-2):10.1f}  {layer.degrees_of_freedom(1e-4):12.1f}")

# %% [markdown]
# At one percent of the energy, about ten of 128. The reason is on the left of the next picture: the eigenvalues fall
# fast. The count on the right rises as the noise level goes down, and each factor of ten buys more dimensions.

# %%
relative = np.logspace(-7, 0, 80)
with figure_style():
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 2.7), layout="constrained")
    for (name, layer), colour, line in zip(spectra.items(), (GREEN, BLUE, VERMILION), LINE_STYLES, strict=False):
        label = f"inputs of {name} ({layer.width})"
        share = layer.eigenvalues / layer.trace
        left.plot(np.arange(1, layer.width + 1), share, color=colour, linestyle=line, label=label)
        counts = [layer.degrees_of_freedom(lam) for lam in relative]
        right.plot(relative, counts, color=colour, linestyle=line)
    left.axhline(0.01, **REFERENCE)
    left.text(128, 0.012, "noise at 1 %", ha="right", fontsize=7, color="0.35")
    left.set(xscale="log", yscale="log", ylim=(1e-9, 2), xlabel="number $j$ of the eigenvalue")
    left.set_ylabel("share of the energy, $\\mu_j / \\mathrm{Tr}\\,\\Sigma$")
    left.legend(loc="lower left")
    right.axvline(0.01, **REFERENCE)
    right.set(xscale="log", xlabel="noise level, $\\lambda / \\mathrm{Tr}\\,\\Sigma$", ylabel="degrees of freedom")

# %% [markdown]
# ## Who holds them? Leverage scores
#
# Each node's share of $N(\lambda)$ is its **leverage score**,
#
# $$q_j = \frac{[\Sigma(\Sigma + \lambda I)^{-1}]_{jj}}{N(\lambda)}, \qquad \sum_j q_j = 1.$$
#
# A node that says what others say has a low score. A node that never fires has none. **What do you expect:** do all
# 128 nodes hold about the same share, 1/128?

# %%
hidden = spectra["fc2"]
lam = 1e-2 * hidden.trace
share = np.diag(hidden.covariance @ np.linalg.inv(hidden.covariance + lam * np.eye(hidden.width)))
q = share / share.sum()
print(f"sum of the scores {q.sum():.6f}, largest difference to the package {abs(q - hidden.leverage(1e-2)).max():.1e}")
silent = int(np.sum(q < 1e-12))
print(f"the top half of the nodes holds {np.sort(q)[::-1][: hidden.width // 2].sum():.0%}; {silent} nodes hold nothing")

with figure_style():
    figure, ax = plt.subplots(figsize=(3.4, 2.2), layout="constrained")
    ax.bar(np.arange(1, hidden.width + 1), 100 * np.sort(q)[::-1], width=1.0, color=BLUE)
    ax.axhline(100 / hidden.width, **REFERENCE)
    ax.text(hidden.width, 100 / hidden.width + 0.05, "equal shares", ha="right", fontsize=7, color="0.35")
    ax.set(xlabel="nodes of the first hidden layer, sorted", ylabel="leverage score (%)")

# %% [markdown]
# ## Why it matters
#
# A ridge of size $\lambda$ cannot tell apart what is smaller than $\lambda$. So about $N(\lambda)$ well chosen nodes
# are enough to say what all nodes say, up to an error of about $\lambda$. That is spectral pruning, and the next
# example does it by hand.
#
# ## Exercises
#
# 1. At which $\lambda$ does layer `fc2` have exactly 20 degrees of freedom? Find it by bisection.
# 2. What is $N(0)$? What is $N(\lambda)$ for a huge $\lambda$?
# 3. Write every node down twice, so that the layer has 256. How does $N(\lambda)$ change? There is an exact answer.
# 4. Do the layers of an *untrained* network have more or fewer degrees of freedom? Guess first.
#
# The answers follow.

# %% [markdown]
# **Answer 1.** $N$ falls with $\lambda$, so bisection works; on a logarithmic scale, because $\lambda$ spans many
# powers of ten.

# %%
low, high = 1e-12, hidden.trace
for _ in range(100):
    middle = np.sqrt(low * high)
    low, high = (middle, high) if count(hidden.covariance, middle) > 20 else (low, middle)
lam_20 = inverse_degrees_of_freedom(hidden.eigenvalues, 20)
print(f"lambda = {high / hidden.trace:.3g} of the trace; by the package {lam_20 / hidden.trace:.3g}")
assert np.isclose(high, lam_20, rtol=1e-6)

# %% [markdown]
# **Answer 2.** Without noise every direction counts that has any length at all: $N(0)$ is the rank. With a huge
# $\lambda$ nothing counts: $N(\lambda) \le \mathrm{Tr}\,\Sigma / \lambda \to 0$.

# %%
rank = np.count_nonzero(hidden.eigenvalues)
print(f"N(0) = {hidden.degrees_of_freedom(0.0):.0f}, rank {rank}; N(1000 Tr) = {hidden.degrees_of_freedom(1e3):.4f}")
assert hidden.degrees_of_freedom(0.0) == rank
assert hidden.degrees_of_freedom(1e3) <= 1e-3

# %% [markdown]
# **Answer 3.** The new matrix is $\begin{pmatrix}\Sigma & \Sigma\\ \Sigma & \Sigma\end{pmatrix}$. Its eigenvalues are
# $2\mu_j$, and as many zeros. So $N_\text{twice}(\lambda) = N(\lambda / 2)$. The energy has doubled, too: at the same
# *share* of the energy, $N_\text{twice}(2\lambda) = N(\lambda)$. Twice the nodes, and not one degree of freedom more.

# %%
twice = np.tile(hidden.covariance, (2, 2))
once, doubled = count(hidden.covariance, lam), count(twice, 2 * lam)
print(f"N = {once:.6f} with {hidden.width} nodes, {doubled:.6f} with {len(twice)} nodes")
assert np.isclose(once, doubled, rtol=1e-8)

# %% [markdown]
# **Answer 4.** More, at one percent. Training puts more of the energy into the ten leading directions, and there are
# ten classes. The pixels are the same before and after, of course. (At ten percent it is the other way round: ask how
# many degrees of freedom there are, and the answer is "at which noise?".)

# %%
fresh = layer_spectra(initial_network(trained), data.train_batches())
print("layer  N(0.01 Tr)            share of ten leading directions")
for name, after in spectra.items():
    before = fresh[name]
    energy = [layer.eigenvalues[:10].sum() / layer.trace for layer in (before, after)]
    counts = [layer.degrees_of_freedom(1e-2) for layer in (before, after)]
    print(f"{name}    {counts[0]:4.1f}, trained {counts[1]:4.1f}    {energy[0]:.1%}, trained {energy[1]:.1%}")
assert np.isclose(fresh["fc1"].degrees_of_freedom(1e-2), spectra["fc1"].degrees_of_freedom(1e-2))
for name in ("fc2", "fc3"):
    assert fresh[name].degrees_of_freedom(1e-2) > spectra[name].degrees_of_freedom(1e-2)
    assert fresh[name].degrees_of_freedom(1e-1) < spectra[name].degrees_of_freedom(1e-1)
