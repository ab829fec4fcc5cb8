"""The words of the command line: which there are, what they accept, and an example of each command."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import specprune
from specprune.analysis.certify import STARTS
from specprune.analysis.comparison import KEEPS
from specprune.analysis.comparison import METHODS as COMPARED
from specprune.analysis.measures import MEASURES
from specprune.compress.allocation import ALLOCATIONS
from specprune.compress.choice import SELECTIONS
from specprune.compress.low_rank_cost import LOW_RANK_MEASURES
from specprune.compress.reconstruction import RECONSTRUCTIONS
from specprune.compress.selection import RULES
from specprune.compress.settings import BUDGETS, METHODS, Settings
from specprune.testbed import CATALOG, ZOO_GRIDS
from specprune.testbed.ensemble import MAX_EPOCHS, TARGET_LOSS
from specprune.testbed.zoo import FAMILIES

DATA = tuple(CATALOG)
_ALLOCATIONS = tuple(name for name in ALLOCATIONS if name != "theory")  # which takes its widths from lambda
_SELECTIONS = tuple(name for name in SELECTIONS if name != "scores")  # which only a program can give


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="specprune",
        description="Spectral pruning of neural networks, with the bounds behind it.",
        epilog="Start with: specprune demo --out results/demo",
    )
    parser.add_argument("--version", action="version", version=f"specprune {specprune.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = _command(commands, "demo", "the whole story on the built-in digits", "specprune demo --out results")
    _add_common(demo, json=False)

    data = _command(commands, "data", "download a data set", "specprune data mnist")
    data.add_argument("name", choices=DATA[1:], help="which one")
    data.add_argument("--data-dir", help="where to put it; by default the user's cache")

    training = _command(
        commands,
        "train",
        "train a reference network",
        "specprune train --data mnist --net mlp-300-1000-300 --out results",
    )
    _add_data(training, "which data set", required=True)
    training.add_argument("--net", required=True, help="mlp-W1-W2-..., vgg, vgg-C1-C2-... or resnet")
    training.add_argument("--epochs", type=_positive_int, help="by default what suits the network")
    _add_common(training)

    spectra = _command(
        commands,
        "spectra",
        "spectra and degrees of freedom of every layer",
        "specprune spectra --weights results/mnist-mlp-300-1000-300-0.npz",
    )
    _add_problem(spectra)
    _add_common(spectra)

    prune = _command(
        commands,
        "prune",
        "make a network smaller",
        "specprune prune --weights results/mnist-mlp-300-1000-300-0.npz --keep 0.2",
    )
    _add_problem(prune)
    prune.add_argument(
        "--method",
        choices=METHODS,
        default="spectral",
        help="the others take --keep, --measure and --distill-steps only (default spectral)",
    )
    _add_pruning(prune, keep=0.3)
    _add_common(prune)

    comparison = _command(
        commands,
        "compare",
        "spectral pruning, low rank, sampling and others at equal size",
        "specprune compare --weights results/mnist-mlp-300-1000-300-0.npz --keeps 0.5,0.3,0.2",
    )
    _add_problem(comparison)
    comparison.add_argument(
        "--keeps",
        type=_fractions,
        default=KEEPS,
        metavar="F,F,...",
        help=f"fractions to keep (default {','.join(map(str, KEEPS))})",
    )
    comparison.add_argument(
        "--measure", choices=LOW_RANK_MEASURES, default="flops", help="fractions of what (default flops)"
    )
    comparison.add_argument(
        "--method",
        action="append",
        choices=COMPARED,
        metavar="NAME",
        help=f"a method to compare, may be repeated (default all): {', '.join(map(repr, COMPARED))}",
    )
    _add_common(comparison)

    bounds = _command(
        commands,
        "bounds",
        "generalization bounds of a network and its pruned version",
        "specprune bounds --weights results/mnist-mlp-300-1000-300-0.npz --keep 0.05",
    )
    _add_problem(bounds)
    _add_pruning(bounds, keep=0.05)
    _add_delta(bounds)
    bounds.add_argument(
        "--posterior-steps",
        type=_positive_int,
        metavar="STEPS",
        help="also train a Gaussian posterior by PAC-Bayes from one epoch on, and certify it (5000 are a good number; "
        "networks of 'specprune train' without batch norms)",
    )
    _add_common(bounds)

    tightness = _command(
        commands,
        "tightness",
        "how the bounds move with samples, width, depth, label noise and pruning (trains 16 networks)",
        "specprune tightness --data digits --out results/tightness",
    )
    _add_data(tightness, "which data set (default digits)", default="digits")
    _add_common(tightness)

    curve = _command(
        commands,
        "tradeoff",
        "bias, variance, bounds and errors at many widths",
        "specprune tradeoff --weights results/mnist-mlp-300-1000-300-0.npz --keep 0.01 0.05 0.1 0.2 0.5 1",
    )
    _add_problem(curve)
    grid = curve.add_mutually_exclusive_group()
    grid.add_argument("--keep", type=_fraction, nargs="+", metavar="F", help="fractions of the FLOPs to keep")
    grid.add_argument("--lambdas", type=_positive, nargs="+", metavar="L", help="relative lambdas instead")
    curve.add_argument("--selection", choices=sorted(RULES), default="greedy", help="rule that picks the nodes")
    curve.add_argument("--theta", type=_unit, default=0.0, help="weight of the input loss, 0..1 (default 0)")
    _add_delta(curve)
    _add_common(curve)

    certification = _command(
        commands,
        "certify",
        "search for a network with a short word, and bound its test error from the training set alone",
        "specprune certify --data mnist --budget 60 --out results/certify-mnist",
    )
    _add_data(certification, "which data set (default digits)", default="digits")
    certification.add_argument(
        "--budget",
        type=_not_negative,
        default=2.0,
        metavar="MINUTES",
        help="time to search (default 2); an interrupted run goes on in the same --out; 0 shows what is there",
    )
    certification.add_argument("--start", choices=STARTS, help="where the search starts (default pruned, if it can)")
    certification.add_argument(
        "--path", action="store_true", help="share the time among several widths and the baselines, and draw them"
    )
    certification.add_argument("--delta", type=_probability, default=0.05, help="allowed probability of failure")
    _add_common(certification)

    verification = _command(
        commands,
        "verify",
        "check a certificate: decode a network, count its training errors, bound its test error",
        "specprune verify mnist\n  specprune verify results/mine.spnw --data fashion-mnist",
    )
    verification.add_argument("file", metavar="FILE", help="a .spnw file, or the name of one that comes with specprune")
    _add_data(verification, "which data set; by default that of FILE's name")
    verification.add_argument(
        "--delta", type=_probability, default=0.05, help="the certificate fails with at most this probability"
    )
    verification.add_argument("--out", type=Path, default=Path("results"), help="folder for verify.json")
    verification.add_argument("--json", action="store_true", help="print JSON instead of a table")

    descent = _command(
        commands,
        "double-descent",
        "draw risk against size for pruned linear models, random features and networks, theory and simulation",
        "specprune double-descent double_descent --out results/descent",
    )
    descent.add_argument("names", nargs="*", type=_descent_figure, help="which figures; by default all")
    _add_quick(descent)
    _add_common(descent)

    zoo = _command(
        commands,
        "zoo",
        "train many small networks at once; a stopped run goes on in the same --out",
        "specprune zoo --data digits --jobs 2 --out results/zoo\n"
        "  specprune zoo --grid small --width 32,64,128 --seeds 0,1,2 --out results/widths",
    )
    _add_data(zoo, "which data set (default digits)", default="digits")
    zoo.add_argument("--grid", choices=tuple(ZOO_GRIDS), default="default", help="which networks (default default)")
    axes = zoo.add_argument_group("axes", "values, separated by commas, that replace those of the grid")
    axes.add_argument("--family", type=_names(FAMILIES), metavar="NAME,...", help=f"of {', '.join(FAMILIES)}")
    for axis in ("width", "depth", "n", "batch-size"):
        axes.add_argument(f"--{axis}", type=_list_of(_positive_int), metavar="N,...")
    axes.add_argument("--seeds", dest="seed", type=_list_of(_seed), metavar="N,...")
    axes.add_argument("--learning-rate", type=_list_of(_positive), metavar="X,...")
    axes.add_argument("--weight-decay", type=_list_of(_not_negative), metavar="X,...")
    for axis in ("dropout", "label-noise"):
        axes.add_argument(f"--{axis}", type=_list_of(_unit), metavar="F,...")
    zoo.add_argument(
        "--target-loss",
        type=_positive,
        default=TARGET_LOSS,
        help=f"stop a network at this training loss, in nats (default {TARGET_LOSS:g})",
    )
    zoo.add_argument(
        "--max-epochs", type=_positive_int, default=MAX_EPOCHS, help=f"stop it at the latest (default {MAX_EPOCHS})"
    )
    zoo.add_argument("--together", type=_positive_int, default=64, help="networks trained at once (default 64)")
    zoo.add_argument("--jobs", type=_positive_int, default=1, help="processes at once (default 1)")
    zoo.add_argument("--out", type=Path, default=Path("results/zoo"), help="folder of the zoo (default results/zoo)")
    zoo.add_argument("--json", action="store_true", help="print JSON instead of tables")
    zoo.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")

    measures = _command(
        commands,
        "measures",
        "print what measures of generalization say of a network, or rank them over a zoo; without either, list them",
        "specprune measures --weights results/mnist/mnist-mlp-300-1000-300-0.npz\n"
        "  specprune measures --zoo results/zoo --jobs 2 --out results/zoo-measures",
    )
    measures.add_argument("names", nargs="*", type=_measure, help="which measures; by default all")
    measures.add_argument(
        "--zoo", type=Path, help="folder of 'specprune zoo'; finished networks are not measured again"
    )
    measures.add_argument("--jobs", type=_positive_int, default=1, help="processes at once (default 1)")
    _add_problem(measures)
    _add_common(measures)

    figures = _command(
        commands,
        "figures",
        "list all figures, or draw some of them, with their data beside them",
        "specprune figures eigenvalue_decay accuracy --weights results/mnist-mlp-300-1000-300-0.npz",
    )
    figures.add_argument("names", nargs="*", type=_figure, help="which figures, or all; without a name they are listed")
    figures.add_argument(
        "--format", type=_formats, default=("pdf", "png"), metavar="F,F", help="pdf, png or both (default pdf,png)"
    )
    _add_quick(figures)
    _add_problem(figures)
    _add_common(figures)

    report = _command(
        commands,
        "report",
        "one HTML page about a network: spectra with a slider for lambda, trade-off, bounds, pruning",
        "specprune report --weights results/mnist-mlp-300-1000-300-0.npz --out results",
    )
    _add_problem(report)
    _add_pruning(report, keep=0.3)
    _add_delta(report)
    report.add_argument("--no-tradeoff", action="store_true", help="leave out the trade-off curve, which takes longest")
    _add_common(report)
    latex = _command(
        commands,
        "latex",
        "write the theorems and, for a network, its tables as LaTeX files to input",
        "specprune latex --weights results/mnist-mlp-300-1000-300-0.npz --out results/latex",
    )
    _add_problem(latex)
    _add_pruning(latex, keep=0.05)
    _add_delta(latex)
    _add_common(latex)
    return parser


def _command(commands: Any, name: str, text: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="log what is done, and show where errors come from"
    )
    return parser


def _add_common(parser: argparse.ArgumentParser, json: bool = True) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder for what is written (default results)"
    )
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    else:
        parser.set_defaults(json=False)
    parser.add_argument("--seed", type=_seed, default=0, help="of everything random (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")


def _add_data(
    parser: argparse.ArgumentParser, text: str, *, default: str | None = None, required: bool = False
) -> None:
    parser.add_argument("--data", choices=DATA, default=default, required=required, help=text)
    parser.add_argument("--data-dir", help="where to look for the data first")


def _add_problem(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network and data")
    group.add_argument("--weights", help="checkpoint of 'specprune train'; with --model, a state_dict of torch.save")
    group.add_argument(
        "--model", type=_factory, metavar="PACKAGE.MODULE:FACTORY", help="your network: a function that returns it"
    )
    group.add_argument(
        "--data",
        type=_data,
        metavar="NAME|PACKAGE.MODULE:FACTORY",
        help="data set, or a function that returns (train, test)",
    )
    group.add_argument("--data-dir", help="where to look for named data sets first")
    group.add_argument(
        "--calibration",
        type=_positive_int,
        default=5000,
        help="training samples for spectra, selection and refit (default 5000); tradeoff selects on all of them",
    )


def _add_pruning(parser: argparse.ArgumentParser, keep: float) -> None:
    group = parser.add_argument_group("pruning")
    group.add_argument("--keep", type=_fraction, default=keep, help=f"fraction to keep (default {keep:g})")
    for name, choices, text in (
        ("measure", BUDGETS, "of what"),
        ("allocation", _ALLOCATIONS, "how widths are chosen"),
        ("selection", _SELECTIONS, "rule that picks the nodes"),
        ("reconstruction", RECONSTRUCTIONS, "refit of the next layer"),
    ):
        default = getattr(Settings, name)
        group.add_argument(f"--{name}", choices=choices, default=default, help=f"{text} (default {default})")
    group.add_argument("--theta", type=_unit, default=Settings.theta, help="weight of the input loss, 0..1 (default 0)")
    group.add_argument(
        "--round-to", type=_positive_int, default=Settings.round_to, help="widths are multiples of this (default 1)"
    )
    group.add_argument(
        "--distill-steps",
        type=_count,
        default=Settings.distill_steps,
        help="gradient steps towards the original's outputs at the end, without labels (default 0)",
    )


def _add_quick(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help="small networks and problems, few draws: seconds instead of minutes"
    )


def _add_delta(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--delta", type=_probability, default=0.05, help="a bound fails with at most this probability")
    parser.add_argument(
        "--input-radius", type=_positive, help="bound on the norm of every possible input; known for named data sets"
    )


def _number(text: str, fits: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    return value


def _fraction(text: str) -> float:
    return _number(text, lambda x: 0 < x <= 1, "a fraction above 0 and at most 1")


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def values(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    return values


def _names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(known)}")
        return text

    return _list_of(name)


def _fractions(text: str) -> tuple[float, ...]:
    return tuple(_fraction(part) for part in text.split(","))


def _unit(text: str) -> float:
    return _number(text, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def _probability(text: str) -> float:
    return _number(text, lambda x: 0 < x < 1, "a probability between 0 and 1")


def _positive(text: str) -> float:
    return _number(text, lambda x: 0 < x < float("inf"), "a positive number")


def _not_negative(text: str) -> float:
    return _number(text, lambda x: 0 <= x < float("inf"), "a number of at least 0")


def _positive_int(text: str) -> int:
    return int(_number(text, lambda x: 1 <= x < 2**63 and x == int(x), "a whole number of at least 1"))


def _count(text: str) -> int:
    return int(_number(text, lambda x: 0 <= x < 2**63 and x == int(x), "a whole number, 0 for none"))


def _seed(text: str) -> int:
    return int(_number(text, lambda x: 0 <= x < 2**32 and x == int(x), "a whole number from 0 to 4294967295"))


def _factory(text: str) -> str:
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise argparse.ArgumentTypeError(f"{text!r}: expected package.module:factory")
    return text


def _data(text: str) -> str:
    if ":" not in text and text not in DATA:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(DATA)}, or package.module:factory")
    return text


def _figure(text: str) -> str:
    from specprune.figures import FIGURES  # draws; the other commands do without

    if text not in (*FIGURES, "all"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected all, or one of {', '.join(FIGURES)}")
    return text


def _descent_figure(text: str) -> str:
    from specprune.figures import figures_of  # draws; the other commands do without
    from specprune.figures.registry import OVERPARAMETERISED

    names = figures_of(OVERPARAMETERISED)
    if text not in names:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(names)}")
    return text


def _measure(text: str) -> str:
    if text not in MEASURES:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(MEASURES)}")
    return text


def _formats(text: str) -> tuple[str, ...]:
    from specprune.figures import FORMATS  # draws; the other commands do without

    formats = tuple(text.split(","))
    if any(form not in FORMATS for form in formats):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(FORMATS)}, with commas between them")
    return formats


def check_problem(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse options that do not fit together."""
    if not hasattr(options, "weights"):
        return
    nothing = options.weights is None and options.model is None
    if options.command == "measures" and (nothing or options.zoo is not None):
        if options.zoo is not None and not nothing:
            parser.error("measures: --zoo ranks the measures over its own networks; leave out --weights and --model")
        return
    if nothing and (options.command not in ("figures", "latex") or options.data is not None):
        parser.error(f"{options.command}: no network: give --weights FILE (of 'specprune train') or --model")
    if options.model is not None and options.data is None:
        parser.error(f"{options.command}: no data: --model needs --data NAME or --data package.module:factory")
