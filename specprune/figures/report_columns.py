"""The columns of the report's tables: the key in the result's records, the heading, and what it means."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One column.

    Args:
        key: of the records.
        heading: above the column.
        meaning: a line that explains it; empty if there is none.
        moves: whether the page computes it again when lambda moves.
        vacuous: the key that says whether the value is a bound that says nothing.
    """

    key: str
    heading: str
    meaning: str = ""
    moves: bool = False
    vacuous: str | None = None


LAYERS = (
    Column("layer", "layer", "the layer that reads the nodes"),
    Column("width", "width m", "number of nodes that it reads (channels of a convolution)"),
    Column("dof", "N(λ)", "degrees of freedom at the slider's λ times the trace", moves=True),
    Column("share", "N(λ) / m", "their share of the width", moves=True),
    Column("effective_rank", "effective rank", "exponential of the entropy of the eigenvalues' shares; free of λ"),
    Column("beta", "β", "fitted power law: the j-th eigenvalue is about j to the power −1/β"),
    Column("fit_r2", "R² of the fit", "share of the variance of the logarithms that the power law explains"),
)

NODES = (
    Column("group", "nodes of", "the layer that makes the nodes; the first, if there are several"),
    Column("width", "nodes m", "how many there are"),
    Column("kept", "kept", "how many stay, the degrees of freedom rounded up", moves=True),
    Column("share", "kept / m", "their share", moves=True),
    Column("dof", "N(λ)", "degrees of freedom of these nodes", moves=True),
    Column("lam", "λ of the group", "the slider's λ times the trace of their covariance", moves=True),
    Column("theorem", "theorem's width", "⌈5 N ln(80 N)⌉; - where the theorem says nothing", moves=True),
    Column("readers", "read by", "the layers that read them"),
)

TRADEOFF = (
    Column("flops_kept", "FLOPs kept", "fraction of the original network's FLOPs"),
    Column("params", "parameters", "their number"),
    Column("widths", "widths", "kept nodes of every group"),
    Column("bias", "bias", "Theorem A: training error of the pruned network, rounded"),
    Column("variance", "variance", "Theorem A: what its description length costs"),
    Column("bound", "bound", "Theorem A: bound on the rounded network's error", vacuous="bound_vacuous"),
    Column("rounded_test_error", "its test error", "test error of that rounded network"),
    Column("train_error", "train error", "training error of the pruned network, not rounded"),
    Column("test_error", "test error", "its test error"),
    Column("refit_test_error", "refit test error", "test error of the same nodes after the sequential refit"),
    Column("measured", "measured", "distance of the outputs, root mean square over the training set, in logits"),
    Column("layerwise", "layerwise", "bound on that distance from measured errors of single layers"),
    Column("certificate", "certificate", "bound on it from moments"),
    Column("a_priori", "a priori", "bound on it from λ and norms alone"),
    Column("a_priori_holds", "its hypotheses", "whether c ≤ 4 and s ≤ 5/3 hold in all groups"),
    Column("c_max", "c", "largest c over the groups"),
    Column("s_max", "s", "largest s over the groups"),
    Column("margin_bias", "margin bias", "Theorem C: distance over margin"),
    Column("margin_variance", "margin variance", "Theorem C: covering"),
    Column("margin_bound", "margin bound", "Theorem C: the sum of all terms", vacuous="margin_vacuous"),
)

BOUNDS = (
    Column("bound", "bound", "its name"),
    Column("value", "value", "the bound on the error rate; 1 or more says nothing", vacuous="vacuous"),
    Column("net", "network", "of which network it speaks"),
    Column("test_error", "test error", "measured, where there is a test set"),
    Column(
        "hypotheses_hold",
        "hypotheses hold",
        "no: a condition of the theorem is broken or unproved, and the value promises nothing",
    ),
    Column("empirical", "empirical", "term: what is measured on the training set"),
    Column("bias", "bias", "term: what the compression changes"),
    Column("variance", "variance", "term: what the size of the network costs"),
    Column("confidence", "confidence", "term: what the probability of failure costs"),
    Column("dominant", "dominant", "the largest term"),
    Column(
        "looseness", "looseness", "(bound − training error) / (test error − training error), if that gap is positive"
    ),
)

GROUPS = (
    Column("group", "nodes of", "the layer that makes the nodes; the first, if there are several"),
    Column("consumer", "read by", "the layers that read them"),
    Column("width_before", "nodes before", "how many there were"),
    Column("width_after", "after", "how many are kept"),
    Column("lam", "λ", "in units of the covariance"),
    Column("dof", "N(λ)", "degrees of freedom"),
    Column("leverage_kept", "leverage kept", "sum of the leverage scores of the kept nodes, from 0 to 1"),
    Column("c", "c", "largest eigenvalue of the residual over λ; the theorem asks for c ≤ 4"),
    Column("s", "s", "sum of the weights over the number kept; the theorem asks for s ≤ 5/3"),
    Column("input_loss", "input loss", "share of the nodes' energy that is lost"),
    Column("output_loss", "output loss", "share of what the next layer reads of them that is lost"),
    Column("output_bound", "output bound", "ceiling on the output loss"),
    Column("condition", "condition", "condition number of the system that the refit of the readers solved"),
    Column("flops_before", "FLOPs before", "of the layer that makes the nodes, for one sample"),
    Column("flops_after", "FLOPs after", "the same, after"),
    Column("params_before", "params before", "parameters of that layer and its batch norms"),
    Column("params_after", "params after", "the same, after"),
    Column("seconds", "seconds", "spent on selection and reconstruction"),
)
