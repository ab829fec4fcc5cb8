"""The command line: demo, data, train, spectra, prune, bounds, tradeoff, figures."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import specprune
from specprune._files import write_text
from specprune._problem import Problem, load_problem, torch_device
from specprune._records import format_table, to_json
from specprune.analysis.evaluation import collect_logits, error_rate
from specprune.compress import CalibrationData, Pruned
from specprune.compress.allocation import ALLOCATIONS
from specprune.compress.cost import MEASURES
from specprune.compress.reconstruction import RECONSTRUCTIONS
from specprune.compress.selection import RULES
from specprune.testbed import (
    CATALOG,
    TrainedNetwork,
    default_recipe,
    download_dataset,
    load_dataset,
    save_checkpoint,
    train,
)

OWN_ERRORS = (ValueError, TypeError, OSError, RuntimeError)
DATA = tuple(CATALOG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after the program's name; by default those of the process.

    Returns:
        0 for success, 1 for a failed job (with its reason on one line of standard error).

    Raises:
        SystemExit: with 2 for bad arguments, 0 for --help and --version.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    _check_problem(parser, options)
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        if hasattr(options, "out"):  # before hours of work, not after
            options.out.mkdir(parents=True, exist_ok=True)
        options.run(options)
    except KeyboardInterrupt:
        print("specprune: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # the network and data may be the user's own code, which may raise anything
        if options.verbose:
            logging.getLogger(__name__).info("details", exc_info=True)
        reason = " ".join(str(error).split()) or "no reason given"
        if not isinstance(error, OWN_ERRORS):
            reason = f"{type(error).__name__}: {reason} (-v shows where)"
        print(f"specprune {options.command}: {reason}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="specprune",
        description="Spectral pruning of neural networks, with the bounds behind it.",
        epilog="Start with: specprune demo --out results/demo",
    )
    parser.add_argument("--version", action="version", version=f"specprune {specprune.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = _command(
        commands, "demo", run_demo, "the whole story on the built-in digits", "specprune demo --out results"
    )
    _add_common(demo, json=False)

    data = _command(commands, "data", run_data, "download a data set", "specprune data mnist")
    data.add_argument("name", choices=DATA[1:], help="which one")
    data.add_argument("--data-dir", help="where to put it; by default the user's cache")

    training = _command(
        commands,
        "train",
        run_train,
        "train a reference network",
        "specprune train --data mnist --net mlp-300-1000-300 --out results",
    )
    training.add_argument("--data", required=True, choices=DATA, help="which data set")
    training.add_argument("--net", required=True, help="mlp-W1-W2-..., vgg, vgg-C1-C2-... or resnet")
    training.add_argument("--epochs", type=_positive_int, help="by default what suits the network")
    training.add_argument("--data-dir", help="where to look for the data first")
    _add_common(training)

    spectra = _command(
        commands,
        "spectra",
        run_spectra,
        "spectra and degrees of freedom of every layer",
        "specprune spectra --weights results/mnist-mlp-300-1000-300-0.npz",
    )
    _add_problem(spectra)
    _add_common(spectra)

    prune = _command(
        commands,
        "prune",
        run_prune,
        "make a network smaller",
        "specprune prune --weights results/mnist-mlp-300-1000-300-0.npz --keep 0.2",
    )
    _add_problem(prune)
    _add_pruning(prune, keep=0.3)
    _add_common(prune)

    bounds = _command(
        commands,
        "bounds",
        run_bounds,
        "generalization bounds of a network and its pruned version",
        "specprune bounds --weights results/mnist-mlp-300-1000-300-0.npz --keep 0.05",
    )
    _add_problem(bounds)
    _add_pruning(bounds, keep=0.05)
    _add_delta(bounds)
    _add_common(bounds)

    curve = _command(
        commands,
        "tradeoff",
        run_tradeoff,
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

    figures = _command(
        commands,
        "figures",
        run_figures,
        "draw the figures, with their data beside them",
        "specprune figures --weights results/mnist-mlp-300-1000-300-0.npz --out results/figures",
    )
    figures.add_argument("names", nargs="*", type=_figure, help="which figures; by default all")
    _add_problem(figures)
    _add_common(figures)
    return parser


def _command(commands: Any, name: str, run: Callable[..., None], text: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
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
    group.add_argument("--measure", choices=MEASURES, default="flops", help="of what (default flops)")
    group.add_argument("--allocation", choices=ALLOCATIONS[:2], default="uniform", help="how widths are chosen")
    group.add_argument("--selection", choices=sorted(RULES), default="greedy", help="rule that picks the nodes")
    group.add_argument("--theta", type=_unit, default=0.0, help="weight of the input loss, 0..1 (default 0)")
    group.add_argument(
        "--reconstruction", choices=RECONSTRUCTIONS, default="sequential", help="refit of the next layer"
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


def _unit(text: str) -> float:
    return _number(text, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def _probability(text: str) -> float:
    return _number(text, lambda x: 0 < x < 1, "a probability between 0 and 1")


def _positive(text: str) -> float:
    return _number(text, lambda x: 0 < x < float("inf"), "a positive number")


def _positive_int(text: str) -> int:
    return int(_number(text, lambda x: 1 <= x < 2**63 and x == int(x), "a whole number of at least 1"))


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

    if text not in FIGURES:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(FIGURES)}")
    return text


def _check_problem(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse options that do not fit together."""
    if not hasattr(options, "weights"):
        return
    nothing = options.weights is None and options.model is None
    if nothing and (options.command != "figures" or options.data is not None):
        parser.error(f"{options.command}: no network: give --weights FILE (of 'specprune train') or --model")
    if options.model is not None and options.data is None:
        parser.error(f"{options.command}: no data: --model needs --data NAME or --data package.module:factory")


def _problem(options: argparse.Namespace) -> Problem:
    return load_problem(
        weights=options.weights,
        model=options.model,
        data=options.data,
        data_dir=options.data_dir,
        device=options.device,
    )


def _show(options: argparse.Namespace, name: str, result: Any, **extra: Any) -> None:
    """Print a result as a table or JSON, and keep the JSON, with what made it, in the output folder."""
    made_by = {key: value for key, value in vars(options).items() if key not in ("run", "verbose", "json", "command")}
    record = {
        "command": options.command,
        "options": made_by,
        "versions": {"specprune": specprune.__version__, "torch": torch.__version__, "numpy": np.__version__},
        **extra,
        "result": json.loads(result.to_json()),
    }
    text = to_json(record)
    path = options.out / f"{name}.json"
    write_text(path, text + "\n")
    print(text if options.json else f"{result}\n[{path}]")


def _say(options: argparse.Namespace, text: str) -> None:
    if not options.json:
        print(text)


def run_demo(options: argparse.Namespace) -> None:
    """Train on the built-in digits; measure, prune, bound, draw."""
    from specprune.figures import FigureSetting, make_figures  # draws; the other commands do without

    dataset = load_dataset("digits").to(torch_device(options.device))
    _say(options, "1. A network trained on 1400 images of handwritten digits (8 x 8 pixels)")
    trained = train(dataset, default_recipe("digits", "mlp-128-128-128", options.seed), options.device)
    save_checkpoint(options.out / "digits-mlp-128-128-128.npz", trained)
    _say(options, f"   training error {trained.train_error:.2%}, test error {trained.test_error:.2%}\n")
    model, batches, test = trained.model, dataset.train_batches(), dataset.test_batches()
    _say(options, "2. How many dimensions does each layer really use?")
    _show(options, "spectra", specprune.layer_spectra(model, batches))
    _say(options, "\n3. How small can it become? Keep 30 % of the FLOPs, with and without reconstruction")
    errors = []
    for reconstruction in ("sequential", "channel", "none"):
        pruned = specprune.prune(model, batches, keep=0.3, reconstruction=reconstruction, seed=options.seed)
        errors.append({"reconstruction": reconstruction, **_pruned_errors(pruned, test)})
        if reconstruction == "sequential":
            specprune.save_pruned(pruned, options.out / "digits-pruned.npz")
            _show(options, "prune", pruned.report)
    _say(options, format_table(errors))
    _say(options, "\n4. What does theory promise? Bias falls with the width, variance rises")
    curve = specprune.tradeoff(model, batches, test, input_radius=dataset.input_radius, seed=options.seed)
    _show(options, "tradeoff", curve)
    _say(options, "\n5. Bounds on the error rate, full network and pruned to 2 % of the FLOPs")
    small = specprune.prune(model, batches, keep=0.02, seed=options.seed)
    _show(options, "bounds", specprune.bound_table(model, batches, small, test, input_radius=dataset.input_radius))
    _say(options, "\n6. Figures")
    setting = FigureSetting(model, dataset, "digits, mlp-128-128-128", seed=options.seed, tradeoff=curve)
    for path in make_figures(setting, options.out):
        _say(options, f"   {path}")


def run_data(options: argparse.Namespace) -> None:
    """Download a data set into the cache or a folder."""
    print(download_dataset(options.name, options.data_dir))


def run_train(options: argparse.Namespace) -> None:
    """Train a reference network and save a checkpoint."""
    dataset = load_dataset(options.data, options.data_dir)
    torch_device(options.device)
    recipe = default_recipe(options.data, options.net, options.seed)
    if options.epochs is not None:
        recipe = dataclasses.replace(recipe, epochs=options.epochs)
    trained = train(dataset, recipe, options.device)
    path = options.out / f"{options.data}-{options.net}-{options.seed}.npz"
    save_checkpoint(path, trained)
    _print_trained(options, trained, path)


def _print_trained(options: argparse.Namespace, trained: TrainedNetwork, path: Path) -> None:
    if options.json:
        record = {
            "weights": path,
            "recipe": dataclasses.asdict(trained.recipe),
            "train_error": trained.train_error,
            "test_error": trained.test_error,
            "history": list(trained.history),
        }
        print(to_json(record))
        return
    print(format_table(list(trained.history), title=f"{trained.recipe.net} on {trained.recipe.data}"))
    print(f"training error {trained.train_error:.2%}, test error {trained.test_error:.2%}\n[{path}]")


def run_spectra(options: argparse.Namespace) -> None:
    """Print the spectra of every layer's inputs."""
    problem = _problem(options)
    _show(options, "spectra", specprune.layer_spectra(problem.model, problem.calibration(options.calibration)))


def run_prune(options: argparse.Namespace) -> None:
    """Prune a network, save it, print the report and the errors before and after."""
    problem = _problem(options)
    pruned = _prune(options, problem)
    path = options.out / "pruned.npz"
    specprune.save_pruned(pruned, path)
    before = after = None
    if problem.test is not None:
        before = error_rate(*collect_logits(problem.model, CalibrationData(problem.test)))
        after = _pruned_errors(pruned, problem.test)["test_error"]
    _show(options, "prune", pruned.report, file=path, test_error_before=before, test_error_after=after)
    if before is not None:
        _say(options, f"test error {before:.2%} before, {after:.2%} after")
    _say(options, f"[{path}]")


def run_bounds(options: argparse.Namespace) -> None:
    """Print every bound on a network and its pruned version."""
    problem = _problem(options)
    table = specprune.bound_table(
        problem.model,
        problem.train,
        _prune(options, problem),
        problem.test,
        delta=options.delta,
        input_radius=options.input_radius or problem.input_radius,
    )
    _show(options, "bounds", table)


def run_tradeoff(options: argparse.Namespace) -> None:
    """Print and draw the trade-off curve."""
    problem = _problem(options)
    curve = specprune.tradeoff(
        problem.model,
        problem.train,
        problem.test,
        keep=options.keep,
        lambdas=options.lambdas,
        calibration=problem.calibration(options.calibration),
        selection=options.selection,
        theta=options.theta,
        delta=options.delta,
        input_radius=options.input_radius or problem.input_radius,
        seed=options.seed,
    )
    _show(options, "tradeoff", curve)
    from specprune.figures import bias_variance, save_figure  # draws; the other commands do without

    figure = bias_variance.draw(bias_variance.from_tradeoff(curve, problem.label))
    for path in save_figure(figure, options.out / "tradeoff"):
        _say(options, f"[{path}]")


def run_figures(options: argparse.Namespace) -> None:
    """Draw the figures for a network; without one, for a net trained on the built-in digits."""
    from specprune.figures import FigureSetting, make_figures  # draws; the other commands do without

    if options.weights is None and options.model is None:
        dataset = load_dataset("digits").to(torch_device(options.device))
        trained = train(dataset, default_recipe("digits", "mlp-128-128-128", options.seed), options.device)
        setting = FigureSetting(trained.model, dataset, "digits, mlp-128-128-128", seed=options.seed)
    else:
        problem = _problem(options)
        if problem.dataset is None:
            raise ValueError("figures need a named data set, or a --data factory that returns a testbed Dataset")
        setting = FigureSetting(
            problem.model, problem.dataset, problem.label, calibration=options.calibration, seed=options.seed
        )
    paths = make_figures(setting, options.out, options.names or None)
    print(to_json(paths) if options.json else "\n".join(str(path) for path in paths))


def _prune(options: argparse.Namespace, problem: Problem) -> Pruned:
    return specprune.prune(
        problem.model,
        problem.calibration(options.calibration),
        keep=options.keep,
        measure=options.measure,
        allocation=options.allocation,
        selection=options.selection,
        theta=options.theta,
        reconstruction=options.reconstruction,
        seed=options.seed,
    )


def _pruned_errors(pruned: Pruned, test: Any) -> dict[str, Any]:
    logits, targets = collect_logits(pruned.model, CalibrationData(test))
    report = pruned.report
    return {
        "flops_kept": report.flops_after / report.flops_before,
        "params": report.params_after,
        "test_error": error_rate(logits, targets),
    }
