# %% [markdown]
# # 3. Why bounds are vacuous, and one that is not
#
# A generalization bound promises: on new data the network errs on at most so many percent, and this promise is made
# from the training set alone. Most bounds promise at most 100 percent, or 10,000. Here is why, and what can be done.

# %%
import importlib.resources
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import binom
from torch.func import jacrev, vmap

from specprune import bound_table, prune, tradeoff
from specprune.analysis import certificate_of, load_network, measure_norms, occam_results
from specprune.bounds import golowich_bound, occam_bound, occam_bound_relaxed, ramp_loss
from specprune.compress import CalibrationData
from specprune.figures.style import BLUE, GREEN, REFERENCE, VERMILION, figure_style
from specprune.testbed import default_recipe, load_dataset, randomize_labels, train

data = load_dataset("digits")
batches, test = data.train_batches(), data.test_batches()
model = train(data, default_recipe("digits", "mlp-128-64")).model
pruned = prune(model, batches, keep=0.05)
table = bound_table(model, batches, pruned, test, input_radius=data.input_radius)
with importlib.resources.as_file(importlib.resources.files("specprune.testbed") / "data" / "digits.spnw") as file:
    short_word = certificate_of(load_network(file), data)

rows = {
    ("original", "Bartlett 2017 (union)"): "Bartlett 2017",
    ("original", "Neyshabur 2018 (product)"): "Neyshabur 2018",
    ("original", "Golowich 2018 (frobenius)"): "Golowich 2018",
    ("original", "covering (single scale)"): "covering numbers",
    ("pruned", "covering (single scale)"): "covering numbers, pruned",
    ("coded", "Occam (kl)"): "code length, pruned",
    ("test", "test set (Clopper-Pearson)"): "held-out test set (397)",
}
values = {}
for (net, name), label in rows.items():
    wanted = {"coded": "pruned, ", "test": "original"}.get(net, net)
    values[label] = min(b.value for who, b in table.bounds if b.name == name and who.startswith(wanted))
values["short word (below)"] = short_word.value
values = dict(sorted(values.items(), key=lambda item: -item[1]))

with figure_style():
    figure, ax = plt.subplots(figsize=(4.8, 2.8), layout="constrained")
    sizes = 100 * np.array(list(values.values()))
    ax.hlines(range(len(sizes)), 1, sizes, color="0.8", linewidth=1)
    for row, value in enumerate(sizes):
        ax.plot(value, row, "o", color=VERMILION if value >= 100 else BLUE)
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        ax.text(1.5 * value, row, f"{value:,.0f} %", va="center", fontsize=7, bbox=white)
    ax.axvline(100, **REFERENCE, zorder=0)
    ax.set_yticks(range(len(sizes)), list(values))
    ax.set(xscale="log", xlim=(1, 1e7), xlabel="bound on the error (%), 1400 training images")

# %% [markdown]
# The network errs on about 2 percent of the test images. Everything right of the dotted line is **vacuous**: no
# network ever errs on more than 100 percent.
#
# The red ones are true all the same. They are theorems. They just say nothing here. (Each holds with probability 95 %
# by itself; who quotes the smallest of several owes a union bound.)

# %% [markdown]
# ## Why the training error alone promises nothing
#
# For one network that was fixed *before* the data, $n$ examples are a coin tossed $n$ times: the true error is near
# the measured one, within $\sqrt{\ln(1/\delta) / 2n}$ (Hoeffding).
#
# But training looks for the network with the smallest error on just these examples. The promise must then hold for
# **all networks that could have come out**, at once.

# %%
n, delta = len(data.train_targets), 0.05
weights = sum(parameter.numel() for parameter in model.parameters())
one = np.sqrt(np.log(1 / delta) / (2 * n))
every = np.sqrt((32 * weights * np.log(2) + np.log(1 / delta)) / (2 * n))
print(f"one network fixed before: training error + {one:.1%}")
print(f"all networks of {weights:,} weights in 32 bits: training error + {every:,.0%}")

# %% [markdown]
# The second number is a union bound over $2^{32 \cdot 17226}$ networks: each may fail with a tiny share of $\delta$.
#
# It is vacuous because a word of half a million bits can hold the labels of all 1400 images a hundred times. A bound
# that cannot tell whether the network *did* that must say nothing.

# %% [markdown]
# ## Why norms do not save it
#
# Norm bounds count more cleverly: not the weights, but how large they are, against the margin $\gamma$ by which the
# right class wins. One of them (Golowich, Rakhlin and Shamir 2018) has, for $L$ layers and $K$ classes, the term
#
# $$\frac{4}{\gamma\, n}\; \lVert X \rVert_F\; \prod_l \lVert W_l \rVert_F\; \sqrt{K}\;
#   \sqrt{\left(1 + \sqrt{2 (L-1) \ln 2}\right)^2 + 1} .$$
#
# **What do you expect:** which factor is the culprit?

# %%
norms = measure_norms(model, batches)
frobenius = np.prod([layer.frobenius for layer in norms.layers])
gamma = 16.0
factors = {
    "4 / gamma": 4 / gamma,
    "||X||_F / n": norms.inputs.extended_frobenius / n,
    "product of ||W||_F": 2.0 ** np.ceil(np.log2(frobenius)),  # rounded up: its size was seen after the data
    "sqrt(K)": np.sqrt(10),
    "depth": np.sqrt((1 + np.sqrt(2 * 2 * np.log(2))) ** 2 + 1),
}
print("factor               value   product so far")
product = 1.0
for name, factor in factors.items():
    product *= factor
    print(f"{name:18}  {factor:6.3g}   {product:14.4g}")

logits = np.concatenate([model(inputs).detach().numpy() for inputs, _ in batches])
ramp = ramp_loss(logits, data.train_targets.numpy(), gamma)
bound = golowich_bound(norms.layers, norms.inputs, gamma=gamma, delta=delta, empirical_ramp=ramp)
print(f"the package's term:        {bound.terms['variance']:18.4g}")

# %% [markdown]
# The product of the layers' norms. It is what the network could do to an input *if every layer stretched it the most,
# one after the other*. Compare with how much it really stretches: the largest singular value of its derivative at the
# training images.

# %%
derivatives = vmap(jacrev(model))(data.train_inputs[:300, None]).reshape(300, 10, 64)
stretch = float(torch.linalg.matrix_norm(derivatives.detach(), ord=2).max())
spectral = np.prod([np.linalg.norm(layer.weight.detach().numpy(), 2) for layer in (model.fc1, model.fc2, model.fc3)])
print(f"largest stretch at 300 training images {stretch:6.0f}")
print(f"product of the largest singular values {spectral:6.0f}")
print(f"product of the Frobenius norms         {frobenius:6.0f}")

# %% [markdown]
# The largest singular values are nearly honest here. The Frobenius norms add up *all* directions, also those that no
# image ever uses, and example 1 showed that most directions are not used.
#
# The bounds with largest singular values instead pay for the number of directions in another factor: look at Bartlett
# and Neyshabur 2018 in the first picture.

# %% [markdown]
# ## The way out: say it in few bits
#
# Go back to counting. Write a network down in a fixed language. If its word has $b$ bits, its share of $\delta$ is
# $2^{-b}$, and with probability $1 - \delta$, for all networks at once,
#
# $$\mathrm{kl}(\text{training error} \,\Vert\, \text{true error}) \le \frac{b \ln 2 + \ln(1/\delta)}{n} .$$
#
# Without any training error this is solved by hand: $1 - \exp\left(-\frac{b \ln 2 + \ln(1/\delta)}{n}\right)$.
#
# **What do you expect:** how many bits may a network have that is to be certified below 50 percent, from 1400 images?

# %%
rounded_full = occam_results(model, CalibrationData(batches), [])
rounded_pruned = occam_results(pruned.model, CalibrationData(batches), [group.width for group in pruned.groups])


def best(results, widths=()):
    """Bits, training error and bound of the best number of bits a weight."""
    result = min(results.values(), key=lambda result: result.bound.value)
    return result.network.code_length(list(widths)) / np.log(2), result.train_error, result.bound.value


marks = {
    "all weights": best(rounded_full),
    "pruned": best(rounded_pruned, [group.width for group in pruned.groups]),
    "short word": (short_word.bits, short_word.train_error, short_word.value),
}
bits = np.logspace(1, 5, 200)
kl_form = 1 - np.exp(-(bits * np.log(2) + np.log(1 / delta)) / n)
root_form = np.sqrt((bits * np.log(2) + np.log(1 / delta)) / (2 * n))
with figure_style():
    figure, ax = plt.subplots(figsize=(4.6, 2.8), layout="constrained")
    ax.plot(bits, 100 * kl_form, color=BLUE, label="kl form, no training error")
    ax.plot(bits, 100 * root_form, color=GREEN, linestyle="--", label="square-root form")
    ax.axhline(100, **REFERENCE)
    for (name, (size, _, value)), marker in zip(marks.items(), "^sD", strict=True):
        ax.plot(size, 100 * value, marker, color=VERMILION, markersize=5, label=f"{name}: {value:.1%}")
    ax.set(xscale="log", ylim=(0, 120), xlabel="bits of the network's description", ylabel="bound on the error (%)")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.1, 1.0), ncols=2)

most_bits = (n * np.log(2) - np.log(1 / delta)) / np.log(2)
print(f"below 50 % without training error: at most {most_bits:.0f} bits, {most_bits / n:.2f} an image")
for name, (size, error, value) in marks.items():
    print(f"{name:11}  {size:7.0f} bits   training error {error:5.1%}   bound {value:7.2%}")

# %% [markdown]
# About one bit an image. That is the whole story: **a network costs bits, and each example pays for about one.**
#
# Pruning and rounding bring the trained network from vacuous to the edge of saying something. The short word was
# searched for with its bits in the loss (example 6), and says something: at most a third.

# %% [markdown]
# ## Pruning is a trade-off
#
# Fewer nodes are fewer bits, and more training errors. Somewhere in between the bound is smallest. **Where?** Think
# of five percent of the FLOPs, or fifty.

# %%
curve = tradeoff(model, batches, test, input_radius=data.input_radius, keep=(0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5))
with figure_style():
    figure, ax = plt.subplots(figsize=(4.6, 2.9), layout="constrained")
    curve.plot(ax)
    ax.set_ylim(0, 1.5)
    ax.legend(loc="lower left", bbox_to_anchor=(-0.1, 1.0), ncols=2)
best_point = curve.best
print(f"smallest bound {best_point.bound:.1%}", end="")
print(f" at {best_point.flops_kept:.1%} of the FLOPs and {best_point.bits} bits a weight")

# %% [markdown]
# ## The one that is not vacuous, checked by hand
#
# A word of 583 bits, 35 errors on 1400 images. If the true error were $p = 32.1\,\%$ or more, how probable would 35
# errors or fewer be? At most $\delta\, 2^{-583}$: that is what the certificate says, and it can be computed.

# %%
p = short_word.value
tail = binom.logcdf(short_word.errors, n, p) / np.log(2)
budget = np.log2(delta) - short_word.bits
print(f"log2 P(at most {short_word.errors} errors of {n} at p = {p:.4f}) = {tail:.3f}")
print(f"log2(delta) - bits                                = {budget:.3f}")
print(f"certified at most {p:.1%}; measured on new images {short_word.test_error:.1%}")

# %% [markdown]
# ## Exercises
#
# 1. Compute the kl bound of the pruned network yourself, by bisection.
# 2. The square-root form is never below the kl form. Why? Check it on a grid.
# 3. How many images would the whole network, 2 bits a weight and 2 percent training errors, need for a bound of 50
#    percent?
# 4. Train the network on random labels. It can learn them. What must every honest bound say?

# %% [markdown]
# **Answer 1.** The largest $p$ with $\mathrm{kl}(q \Vert p)$ within the budget; $\mathrm{kl}$ rises in $p$ above $q$.


# %%
def kl(q, p):
    """Divergence of two coins, in nats."""
    return q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))


size, error, value = marks["pruned"]
low, high = error, 1.0
for _ in range(60):
    middle = (low + high) / 2
    if kl(error, middle) < (size * np.log(2) + np.log(1 / delta)) / n:
        low = middle
    else:
        high = middle
print(f"by hand {high:.6f}, package {value:.6f}")
assert np.isclose(high, value, atol=1e-9)

# %% [markdown]
# **Answer 2.** Pinsker's inequality: $\mathrm{kl}(q \Vert p) \ge 2 (p - q)^2$. So the same budget allows a larger $p$
# in the square-root form. With small training errors the difference is large.

# %%
for error in (0.001, 0.02, 0.2):
    for nats in (1.0, 100.0, 1000.0):
        kl_value = occam_bound(error, n, nats, delta).value
        root_value = occam_bound_relaxed(error, n, nats, delta).value
        print(f"error {error:5.1%}, {nats:6.0f} nats: kl form {kl_value:6.1%}, square-root form {root_value:6.1%}")
        assert kl_value <= root_value

# %% [markdown]
# **Answer 3.** Solve $\mathrm{kl}(0.02 \Vert 0.5) = (b \ln 2 + \ln(1/\delta)) / n$ for $n$.

# %%
full_bits, full_error, _ = marks["all weights"]
needed = (full_bits * np.log(2) + np.log(1 / delta)) / kl(full_error, 0.5)
print(f"{needed:,.0f} images, {needed / n:.0f} times as many")
assert occam_bound(full_error, int(np.ceil(needed)), full_bits * np.log(2), delta).value <= 0.5

# %% [markdown]
# **Answer 4.** On random labels every network errs on 90 percent of new images, however few training errors it has.
# So every honest bound must say 90 percent or more.

# %%
shuffled = randomize_labels(data, 1.0, seed=0)
recipe = replace(default_recipe("digits", "mlp-128-64"), random_labels=1.0, epochs=80)
memorised = train(data, recipe)
results = occam_results(memorised.model, CalibrationData(shuffled.train_batches()), [])
honest = min(result.bound.value for result in results.values())
print(f"random labels: training error {memorised.train_error:.1%}, bound {honest:.2%}")
assert memorised.train_error < 0.3
assert honest >= 0.9
