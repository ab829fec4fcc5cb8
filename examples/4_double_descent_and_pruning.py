# %% [markdown]
# # 4. Double descent and pruning
#
# A larger network can fit the noise, so it should do worse. It does, up to a point, and beyond it does better again.
# What becomes of that if the network is pruned to a small one in the end?

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from specprune import prune
from specprune.analysis import double_descent, small_or_large
from specprune.bounds import LinearProblem, least_squares_law
from specprune.figures.style import BLACK, BLUE, GREEN, REFERENCE, VERMILION, figure_style
from specprune.testbed import load_dataset

n, keep, seeds = 200, 50, (0, 1)
widths = (50, 100, 150, 200, 220, 260, 300, 400, 600, 800)
data = load_dataset("digits")
images = data.train_inputs.flatten(1).double()
labelled, one_hot = images[:n], torch.eye(10, dtype=torch.float64)[data.train_targets[:n]]
unlabelled = images[n:]
test = data.test_inputs.flatten(1).double()


def random_network(width, seed):
    """Random hidden nodes that never learn, and an output layer fitted by least squares of least norm."""
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)).double()
    with torch.no_grad():
        for parameter, scale in ((network[0].weight, 1 / 8), (network[0].bias, 1 / 4)):
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        hidden = network[1](network[0](labelled))
        network[2].weight.copy_((torch.linalg.pinv(hidden) @ one_hot).T)
        network[2].bias.zero_()
    return network


def error(network):
    """Share of wrong answers on the test images."""
    with torch.no_grad():
        return float((network(test).argmax(1) != data.test_targets).double().mean())


def mean_error(width, prune_it=None):
    """Mean test error over the seeds, of the network or of what pruning makes of it."""
    networks = [random_network(width, seed) for seed in seeds]
    return float(np.mean([error(prune_it(network) if prune_it else network) for network in networks]))


large = [mean_error(width) for width in widths]
with figure_style():
    figure, ax = plt.subplots(figsize=(4.6, 2.6), layout="constrained")
    ax.plot(widths, 100 * np.array(large), "o-", color=BLACK)
    ax.axvline(n, **REFERENCE)
    ax.annotate("200 images", (n, 4), xytext=(-4, 0), textcoords="offset points", ha="right", fontsize=7)
    ax.set(xscale="log", ylim=(0, 80), xlabel="hidden nodes", ylabel="test error (%)")
    ax.set_xticks([50, 100, 200, 400, 800], [50, 100, 200, 400, 800])
    ax.minorticks_off()

# %% [markdown]
# That is **double descent**. 200 labelled digits, random hidden nodes, and an output layer that is fitted by least
# squares. The error falls, rises to a peak near 200 nodes, and falls again, to its lowest at the far right.
#
# (The peak is a little to the right of 200: some nodes never fire, and some repeat what others say.)

# %% [markdown]
# ## Why there is a peak
#
# With fewer nodes than images, least squares averages over the noise. With as many, there is exactly one solution
# that fits every image, and it must bend itself to do so: its weights are huge. With more, there are many such
# solutions, and the one of least norm is calm again.
#
# **What do you expect** of the norm of the output weights at 50, 220 and 800 nodes?

# %%
print("nodes   norm of the output weights   training error")
norms = {}
for width in (50, 220, 800):
    network = random_network(width, 0)
    norms[width] = float(network[2].weight.detach().norm())
    with torch.no_grad():
        wrong = float((network(labelled).argmax(1) != data.train_targets[:n]).double().mean())
    print(f"{width:5}   {norms[width]:26.1f}   {wrong:14.1%}")

# %% [markdown]
# ## Now prune every network to 50 nodes
#
# The network with 50 nodes in the first place errs on some 17 percent. All others are pruned to the same size, in
# three ways:
#
# - keep the 50 nodes with the largest weights;
# - spectral pruning, calibrated on the 200 images that it was trained on;
# - spectral pruning, calibrated on the 1200 *other* training images, without their labels.
#
# **What do you expect:** which of them have a peak? Which of them end below 17 percent?

# %%
spectral = {"selection": "greedy", "reconstruction": "channel"}
ways = {
    "largest weights": lambda net: (
        prune(net, [labelled], widths={"0": keep}, selection="magnitude", reconstruction="none").model
    ),
    "spectral, same images": lambda net: prune(net, [labelled], widths={"0": keep}, **spectral).model,
    "spectral, other images": lambda net: prune(net, [unlabelled], widths={"0": keep}, **spectral).model,
}
larger = widths[1:]
pruned = {name: [mean_error(width, way) for width in larger] for name, way in ways.items()}

with figure_style():
    figure, ax = plt.subplots(figsize=(4.6, 2.9), layout="constrained")
    ax.plot(widths, 100 * np.array(large), "o-", color=BLACK, label="not pruned")
    for (name, values), (style, colour) in zip(
        pruned.items(), (("^-.", GREEN), ("s--", BLUE), ("D-", VERMILION)), strict=True
    ):
        ax.plot(larger, 100 * np.array(values), style, color=colour, label=name)
    ax.axhline(100 * large[0], **REFERENCE)
    ax.text(800, 100 * large[0] + 1.5, "trained small", ha="right", fontsize=7, color="0.35")
    ax.set(xscale="log", ylim=(0, 100), xlabel="hidden nodes before pruning to 50", ylabel="test error (%)")
    ax.set_xticks([50, 100, 200, 400, 800], [50, 100, 200, 400, 800])
    ax.minorticks_off()
    ax.legend(loc="lower left", bbox_to_anchor=(-0.1, 1.0), ncols=2)
print(f"trained small {large[0]:.1%}; trained on {larger[-1]} nodes {large[-1]:.1%}, and pruned to {keep}:")
for name, values in pruned.items():
    print(f"  {name:22}  {values[-1]:6.1%}")

# %% [markdown]
# - **Largest weights:** nothing works. A node is not important because its weights are large, and nothing makes up
#   for the nodes that are gone.
# - **Other images:** the pruned network does what the large one does. It inherits the peak, and the second descent:
#   at the right end it is far better than a network that was trained small. *Train large, then prune.* (It has seen
#   1200 more images, without labels. That is the price.)
# - **Same images:** no peak, and no second descent either. Why? Think, before you read on.

# %% [markdown]
# ## The network that forgot itself
#
# Beyond the peak the large network fits all 200 labels exactly. So on *these* images its outputs *are* the labels.
# Who refits the small network to those outputs fits it to the labels, and all that the large network knew elsewhere
# is lost.
#
# Check it: refit the chosen nodes to the labels directly.

# %%
network = random_network(800, 0)
small = prune(network, [labelled], widths={"0": keep}, ridge=0.0, lam=1e-12, **spectral)
chosen = small.nodes["0"].indices
with torch.no_grad():
    hidden = network[1](network[0](labelled))[:, chosen]
    to_labels = torch.linalg.lstsq(hidden, one_hot).solution.T
    apart = float((small.model[2].weight - to_labels).norm() / to_labels.norm())
print(f"output weights: refitted to the network, and fitted to the labels: {apart:.1e} apart")

# %% [markdown]
# So take calibration images that the network was *not* trained to fit exactly. They need no labels.

# %% [markdown]
# ## The same in theory
#
# For least squares on Gaussian features the risk is known exactly in the limit of many examples and features (Chang,
# Li, Oymak and Thrampoulidis 2021). Take 25 strong features and 975 weak ones, all equally important, and $n = 50$
# examples.
#
# The lines are theory. The dots are simulated here, by hand: draw examples, solve, measure.

# %%
strong, features, examples = 25, 1000, 50
variances = np.where(np.arange(features) < strong, 100.0, 1.0)
beta = np.full(features, 1 / np.sqrt(variances.sum()))
problem = LinearProblem(variances, beta, noise=0.0, n=examples)
theory = double_descent(problem, strong)


def simulate(size, draws=40):
    """Mean test risk of least squares on the first `size` features, and its standard error."""
    generator = np.random.default_rng(size)
    risks = []
    for _ in range(draws):
        x = generator.standard_normal((examples, features)) * np.sqrt(variances)
        found = np.zeros(features)
        found[:size] = np.linalg.pinv(x[:, :size]) @ (x @ beta)
        risks.append(np.sum(variances * (found - beta) ** 2))
    return np.mean(risks), np.std(risks, ddof=1) / np.sqrt(draws)


dots = {size: simulate(size) for size in (25, 35, 80, 150, 400, 1000)}
with figure_style():
    figure, ax = plt.subplots(figsize=(4.6, 2.9), layout="constrained")
    theory.plot(ax, methods=("unpruned", "magnitude", "hessian", "oracle_refit"))
    means, errors = np.array(list(dots.values())).T
    ax.errorbar(list(dots), means, 2 * errors, fmt="o", color=BLACK, markersize=3, label="not pruned, simulated")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.1, 1.0), ncols=2)

# %% [markdown]
# "Hessian" keeps the largest of coefficient times the feature's deviation. At the right end it lies *below* the
# dotted line of a model that was trained on the right 25 features from the start:

# %%
print(small_or_large(problem, keep=strong))

# %% [markdown]
# Why? The weak features worked as a ridge while the large model was trained. Pruning takes them away, and the calm
# coefficients stay.
#
# ## Exercises
#
# 1. Where is the peak of the theory if there are 100 examples? Compute it.
# 2. For fewer features than examples, least squares has a textbook risk, $s^2 \frac{n}{n - k}$ in the limit, with
#    $s^2$ what the features leave unexplained. Check it against the package.
# 3. Redo the pruning of the 800 nodes with fewer unlabelled images: 25, 100, 400. When is it better than training
#    small?
# 4. When is training small better? Make a problem in which only the strong features matter.

# %% [markdown]
# **Answer 1.** At 100, wherever the features come from: the peak is where the number of features is the number of
# examples.

# %%
at_100 = LinearProblem(variances, beta, noise=0.0, n=100)
sizes = np.array([size for size in range(30, 400) if size != 100])
risks = least_squares_law(at_100, sizes).gamma
peak = int(sizes[risks.argmax()])
print(f"largest risk at {peak} features")
assert abs(peak - 100) == 1

# %% [markdown]
# **Answer 2.** Below the peak nothing is shrunk, and the variance is that of $n - k$ left-over directions.

# %%
for size in (10, 25, 40):
    unexplained = problem.effective_noise(np.array([size]))[0]
    textbook = unexplained * examples / (examples - size)
    law = least_squares_law(problem, np.array([size])).gamma[0]
    print(f"{size} features: textbook {textbook:.6f}, package {law:.6f}")
    assert np.isclose(textbook, law, rtol=1e-9)

# %% [markdown]
# **Answer 3.** The refit of 50 nodes needs a few times 50 images.

# %%
fewer = {}
for count in (25, 100, 400):
    fewer[count] = mean_error(
        800, lambda net, count=count: prune(net, [unlabelled[:count]], widths={"0": keep}, **spectral).model
    )
    print(f"{count:4} unlabelled images: test error {fewer[count]:.1%}   (trained small {large[0]:.1%})")
assert fewer[400] < large[0]

# %% [markdown]
# **Answer 4.** Give all features the same variance, and the whole signal to 25 of them. Now the others are no ridge
# that leaves the signal alone: they shrink it as much as themselves.

# %%
equal = LinearProblem(np.ones(features), np.where(np.arange(features) < strong, 0.2, 0.0), noise=0.1, n=examples)
answer = small_or_large(equal, keep=strong)
print(answer)
assert answer.gain < 0
