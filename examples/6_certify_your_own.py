# %% [markdown]
# # 6. Certify your own network
#
# A certificate is a promise about new images that is made from the training images alone: no test set is looked at.
# The search below finds a network that earns one, in seconds.

# %%
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import binom

from specprune import certify, prune
from specprune.analysis import occam_results, save_network, verify
from specprune.analysis.code_design import Design
from specprune.bounds.code_length import code_length_limit
from specprune.compress import CalibrationData
from specprune.compress.integer_network import count_errors, integer_pixels
from specprune.compress.vocabulary import LayerSpec
from specprune.figures.style import BLACK, BLUE, GREEN, figure_style
from specprune.testbed import Dataset, default_recipe, load_dataset, randomize_labels, train

data = load_dataset("digits")
folder = tempfile.TemporaryDirectory()
run = Path(folder.name) / "digits"
found = certify(data, minutes=0.2, out=run)


def draw(result):
    """The certificate and the training error of the best network, as the search went on."""
    seconds = [step.seconds for step in result.history] + [result.seconds]
    values = [step.value for step in result.history] + [result.certificate.value]
    training = [step.errors / result.certificate.n for step in result.history] + [result.certificate.train_error]
    _, ax = plt.subplots(figsize=(4.6, 2.7), layout="constrained")
    ax.step(seconds, 100 * np.array(values), where="post", color=BLACK, label="certified error")
    ax.step(seconds, 100 * np.array(training), where="post", color=BLUE, linestyle="--", label="training error")
    ax.plot(seconds[-1], 100 * result.certificate.test_error, "s", color=GREEN, label="test error, at the end")
    ax.set(ylim=(0, 102), xlabel="seconds of search", ylabel="error (%)")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.1, 1.0), ncols=2)


with figure_style():
    draw(found)

# %% [markdown]
# The black line is what is promised. It falls for two reasons: the network makes fewer training errors, and its
# description gets shorter. (The search stops by the clock, so that your numbers differ a little.)

# %%
first = found.certificate
print(first)

# %% [markdown]
# ## What it is made of
#
# The network is a **word** of so many bits, in a language that was fixed before: small whole-number weights, no
# biases. The word decides everything. From its $b$ bits and the $k$ errors on $n$ training images follows, with
# probability $1 - \delta$ over the draw of those images and for all words at once,
#
# $$\text{true error} \le \max\left\{p : P\big(\mathrm{Binomial}(n, p) \le k\big) \ge \delta\, 2^{-b}\right\}.$$
#
# In words: if the true error were larger than that, so few training errors would be less probable than
# $\delta\, 2^{-b}$. Check it with SciPy: at the certified $p$ the two sides are equal.

# %%
delta = 0.05
tail = binom.logcdf(first.errors, first.n, first.value) / np.log(2)
budget = np.log2(delta) - first.bits
print(f"log2 P(Binomial <= {first.errors}) = {tail:.3f}")
print(f"log2 delta - bits    = {budget:.3f}")

# %% [markdown]
# ## Bits or errors?
#
# The package comes with a network for these images that took two minutes: 583 bits and 35 errors. **What do you
# expect** to help it more: half of the bits at the same errors, or half of the errors at the same bits?

# %%
n, k, b = first.n, 35, 583
shipped, fewer_errors, fewer_bits = (
    code_length_limit(*pair, delta) for pair in ((k, n, b), (k // 2, n, b), (k, n, b // 2))
)
print(f"583 bits, 35 errors   {shipped:7.2%}")
print(f"half of the errors    {fewer_errors:7.2%}")
print(f"half of the bits      {fewer_bits:7.2%}")

# %% [markdown]
# With 1400 images the bits are dear. Here is the whole landscape, with both networks:

# %%
grid_bits, grid_errors = np.linspace(50, 1500, 30), np.linspace(0, 0.4, 29)
landscape = np.array(
    [[code_length_limit(round(e * n), n, round(size), delta) for size in grid_bits] for e in grid_errors]
)
with figure_style():
    figure, ax = plt.subplots(figsize=(4.6, 2.7), layout="constrained")
    lines = ax.contour(grid_bits, 100 * grid_errors, 100 * landscape, levels=range(10, 100, 10), cmap="viridis")
    ax.clabel(lines, fmt="%g %%", fontsize=6)
    for label, size, share, marker in (("found", first.bits, first.train_error, "o"), ("shipped", b, k / n, "s")):
        ax.plot(size, 100 * share, marker, color=BLACK, label=label)
    ax.set(xlabel="bits of the word", ylabel="training error (%)", title="certified error")
    ax.legend(loc="upper right", frameon=True, facecolor="white", edgecolor="none", framealpha=1)

# %% [markdown]
# ## Anyone can check it
#
# The file holds the network and no claim. Who has the file and the training images counts the errors and computes the
# bound. A damaged file is refused.

# %%
file = Path(folder.name) / "mine.spnw"
save_network(file, found.network)
content = file.read_bytes()
checked = verify(content, data)
print(f"{len(content)} bytes; verified: at most {checked.value:.4%}")
damaged = bytearray(content)
damaged[len(content) // 2] ^= 1
try:
    verify(bytes(damaged), data)
except ValueError as error:
    print(f"one bit changed: {error}")

# %% [markdown]
# ## More time
#
# The same folder with more minutes goes on where the run stopped. The best network is kept, so the certificate can
# only fall.

# %%
longer = certify(data, minutes=0.3, out=run).certificate
print(f"after {0.2 * 60:.0f} s {first.value:.2%}, after {0.3 * 60:.0f} s {longer.value:.2%}")
print(f"after two minutes on an idle core: {shipped:.2%} (comes with the package: specprune verify digits)")

# %% [markdown]
# ## Your own data
#
# Any images and labels will do: a `Dataset` of pixels in [0, 1]. Here is another question about the same images: **is
# the digit even or odd?** Two classes, so guessing errs on half.
#
# The network may be your own, too: a `Design` says which layers it has. This one is tiny: two convolutions.

# %%
parity = Dataset(
    "parity",
    data.train_inputs,
    data.train_targets % 2,
    data.test_inputs,
    data.test_targets % 2,
    classes=2,
)
design = Design(
    channels=1,
    pooling=1,
    mirror=False,
    layers=(LayerSpec("conv", 4, 3, 2, 1, 2), LayerSpec("conv", 2, 4, 1, 0, 2, relu=False)),
)
own = certify(parity, minutes=0.1, out=Path(folder.name) / "parity", design=design, start="scratch")
print(f"even or odd: certified {own.certificate.value:.1%}, test error {own.certificate.test_error:.1%}", end="")
print(f", {own.certificate.bits} bits, {own.certificate.weights} weights")

# %% [markdown]
# ## A network that you have already
#
# A PyTorch network was not made to be short. Prune it, round it, and pay for what is left: that is a certificate,
# too, about the pruned and rounded network. With 1400 images it says little (example 3); with 60,000 it says more.

# %%
batches = data.train_batches()
model = train(data, default_recipe("digits", "mlp-128-64")).model
pruned = prune(model, batches, keep=0.05)
results = occam_results(pruned.model, CalibrationData(batches), [group.width for group in pruned.groups], delta=delta)
yours = min(results.values(), key=lambda result: result.bound.value)
print(f"pruned to 5 % of the FLOPs, {yours.network.bits} bits a weight: at most {yours.bound.value:.1%}")

# %% [markdown]
# ## What it does not promise
#
# The promise is about new images *of the same kind*: independent draws from the same source. **What do you expect**
# on images that are transposed, rows for columns?

# %%
turned = data.test_inputs.transpose(2, 3).contiguous()
errors_turned = count_errors(found.network, integer_pixels(turned), data.test_targets)
print(f"certified at most {first.value:.1%}; test images {first.test_error:.1%}", end="")
print(f"; transposed test images {errors_turned / len(turned):.1%}")

# %% [markdown]
# No contradiction: these images were drawn from something else. A certificate is also about *one draw* of the
# training set: in one of twenty such draws (at $\delta = 0.05$) it may be wrong, though its slack makes that far
# rarer in fact.
#
# ## Exercises
#
# 1. One in twenty is too often. What does a certificate with $\delta = 10^{-6}$ cost? Guess first.
# 2. With ten times as many images, the same error rate and the same word: what would be certified?
# 3. Certify the digits with *random labels*. What must come out?
# 4. May you run the search ten times, with ten seeds, and keep the best certificate? And with ten languages?

# %% [markdown]
# **Answer 1.** Hardly anything: $\delta$ enters by its logarithm. $10^{-6}$ instead of $0.05$ costs as much as 15.6
# bits more.

# %%
strict = verify(content, data, delta=1e-6)
extra = math.log2(delta / 1e-6)
print(f"delta 0.05: {checked.value:.2%}; delta 1e-6: {strict.value:.2%}, as for {extra:.1f} bits more")
assert np.isclose(strict.value, code_length_limit(first.errors, n, first.bits + extra, delta), rtol=1e-9)
assert checked.value < strict.value < checked.value + 0.02

# %% [markdown]
# **Answer 2.** The word's bits are paid once, by ten times as many examples.

# %%
more = code_length_limit(10 * first.errors, 10 * n, first.bits, delta)
print(f"n = {n}: {checked.value:.2%}; n = {10 * n}: {more:.2%}; training error {first.train_error:.2%}")
assert first.train_error < more < checked.value

# %% [markdown]
# **Answer 3.** On random labels every network errs on 90 percent of new images. So a certificate must say about that,
# or more, however long one searches.

# %%
shuffled = replace(randomize_labels(data, 1.0, seed=0), name="random labels")
nothing = certify(shuffled, minutes=0.07, out=Path(folder.name) / "random", start="scratch").certificate
print(f"random labels: certified {nothing.value:.1%}, training error {nothing.train_error:.1%}")
assert nothing.value > 0.85

# %% [markdown]
# **Answer 4.** Ten seeds: yes. The promise holds for all words at once, so it does not matter how a word was found,
# or how many were tried. Ten languages: only if the choice is paid for, with $\log_2 10$ bits. (The 8 bits of version
# in each word pay for a choice among 256.)

# %%
paid = code_length_limit(first.errors, n, first.bits + math.log2(10), delta)
print(f"one language {checked.value:.2%}; the best of ten, {math.log2(10):.1f} bits more: {paid:.2%}")
assert checked.value < paid < checked.value + 0.01
folder.cleanup()
