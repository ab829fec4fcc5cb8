"""The command line: a function for each command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import specprune
from specprune._arguments import build_parser, check_problem
from specprune._files import write_text
from specprune._latex import paper_tables, write_latex
from specprune._measures import measured_problem, measured_zoo
from specprune._problem import Problem, load_problem, torch_device
from specprune._records import format_table, to_json
from specprune._report import report_data
from specprune._trends import default_plan, trend_points
from specprune._verify import verified
from specprune.analysis.certificate_path import FACTORS, certificate_path
from specprune.analysis.certify import certify
from specprune.analysis.comparison import METHODS as COMPARED
from specprune.analysis.comparison import classifier_error, compare
from specprune.analysis.evaluation import collect_logits, error_rate
from specprune.analysis.measures import registry_records, registry_table
from specprune.analysis.posterior import Posterior, train_posterior
from specprune.analysis.trends import bound_trends
from specprune.compress import CalibrationData, Pruned
from specprune.testbed import (
    ZOO_GRIDS,
    Dataset,
    TrainedNetwork,
    ZooSetting,
    default_recipe,
    download_dataset,
    load_dataset,
    save_checkpoint,
    train,
    train_zoo,
    zoo_grid,
)

if TYPE_CHECKING:
    from specprune.figures import FigureSetting

_DIGITS_NET, _QUICK_NET = "mlp-128-128-128", "mlp-64-64"
_QUICK = {"calibration": 400, "keep": (0.05, 0.2, 1.0), "quick": True}
_QUICK_EPOCHS = 8
_DEMO_FIGURES = (
    "eigenvalue_decay",
    "degrees_of_freedom",
    "approximation_error",
    "bias_variance",
    "bound_bars",
    "selection_rules",
    "comparison",
)
OWN_ERRORS = (ValueError, TypeError, OSError, RuntimeError)


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
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(words)
    options.words = shlex.join(["specprune", *words])
    check_problem(parser, options)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("specprune").setLevel(logging.INFO if options.verbose else logging.NOTSET)
    try:
        if hasattr(options, "out"):  # before hours of work, not after
            options.out.mkdir(parents=True, exist_ok=True)
        COMMANDS[options.command](options)
    except KeyboardInterrupt:
        print("specprune: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # the network and data may be the user's own code, which may raise anything
        if options.verbose:
            logging.getLogger(__name__).info("details", exc_info=True)
        words_of_error = " ".join(str(error).split()) or "no reason given"
        # A name in somebody else's file must not command the terminal.
        reason = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words_of_error)
        if not isinstance(error, OWN_ERRORS):
            reason = f"{type(error).__name__}: {reason} (-v shows where)"
        print(f"specprune {options.command}: {reason}", file=sys.stderr)
        return 1
    return 0


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
    made_by = {key: value for key, value in vars(options).items() if key not in ("verbose", "json", "command", "words")}
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
    for path in make_figures(setting, options.out, _DEMO_FIGURES, command=options.words):
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
    pruned = _prune(options, problem, latency=True)
    path = options.out / "pruned.npz"
    specprune.save_pruned(pruned, path)
    before = after = None
    if problem.test is not None:
        before, after = (classifier_error(net, CalibrationData(problem.test)) for net in (problem.model, pruned.model))
    _show(options, "prune", pruned.report, file=path, test_error_before=before, test_error_after=after)
    if before is not None and after is not None:
        _say(options, f"test error {before:.2%} before, {after:.2%} after")
    _say(options, f"[{path}]")


def run_compare(options: argparse.Namespace) -> None:
    """Compress a network by several methods to the same size; print and draw what comes out."""
    problem = _problem(options)
    found = compare(
        problem.model,
        problem.calibration(options.calibration),
        problem.test,
        keeps=options.keeps,
        methods=options.method or tuple(COMPARED),
        measure=options.measure,
        seed=options.seed,
    )
    _show(options, "compare", found)
    from specprune.figures import comparison, save_figure  # draws; the other commands do without

    for path in save_figure(comparison.draw(comparison.from_comparison(found, problem.label)), options.out / "compare"):
        _say(options, f"[{path}]")


def _posterior(options: argparse.Namespace, problem: Problem) -> Posterior | None:
    """Return a Gaussian posterior around a briefly trained network, whose prior is centred where training starts."""
    if options.posterior_steps is None:
        return None
    if problem.recipe is None or problem.dataset is None:
        raise ValueError("--posterior-steps needs a network of 'specprune train', whose initial weights are known")
    brief = train(problem.dataset, dataclasses.replace(problem.recipe, epochs=1), options.device)
    return train_posterior(
        brief.model, problem.train, prior=problem.initial, steps=options.posterior_steps, seed=options.seed
    )


def run_bounds(options: argparse.Namespace) -> None:
    """Print every bound on a network and its pruned version."""
    problem = _problem(options)
    table = specprune.bound_table(
        problem.model,
        problem.train,
        _prune(options, problem),
        problem.test,
        reference=problem.initial,
        posterior=_posterior(options, problem),
        delta=options.delta,
        input_radius=options.input_radius or problem.input_radius,
        seed=options.seed,
    )
    _show(options, "bounds", table)
    write_text(options.out / "bounds.tex", table.to_latex())
    _say(options, f"[{options.out / 'bounds.tex'}]")
    from specprune.figures import bound_bars, save_figure  # draws; the other commands do without

    for path in save_figure(bound_bars.draw(bound_bars.from_table(table, problem.label)), options.out / "bounds"):
        _say(options, f"[{path}]")


def run_tightness(options: argparse.Namespace) -> None:
    """Train networks that differ in one thing each; print and draw how the bounds on them move."""
    dataset = load_dataset(options.data, options.data_dir).to(torch_device(options.device))
    plan = default_plan(options.data)
    trends = bound_trends(trend_points(dataset, plan, options.seed))
    _show(options, "tightness", trends, plan=dataclasses.asdict(plan))
    from specprune.figures import bound_trends as trend_figure  # draws; the other commands do without
    from specprune.figures import save_figure

    label = f"{options.data}, {plan.net(plan.base_width, plan.base_depth)}"
    figure = trend_figure.draw(trend_figure.from_trends(trends, label))
    for path in save_figure(figure, options.out / "tightness"):
        _say(options, f"[{path}]")


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


def run_certify(options: argparse.Namespace) -> None:
    """Search for the lowest certificate within a budget of time; with --path, at several widths."""
    dataset = load_dataset(options.data, options.data_dir)
    if options.path:
        _certify_path(options, dataset)
        return
    found = certify(
        dataset,
        minutes=options.budget,
        seed=options.seed,
        out=options.out,
        start=options.start,
        delta=options.delta,
        device=torch_device(options.device),
    )
    _show(options, "certify", found)
    _say(options, f"[{options.out / 'best.spnw'}]")


def _certify_path(options: argparse.Namespace, dataset: Dataset) -> None:
    share = options.budget / (len(FACTORS) + 2)  # two baselines
    path = certificate_path(
        dataset,
        minutes=share,
        seed=options.seed,
        out=options.out,
        delta=options.delta,
        device=torch_device(options.device),
    )
    _show(options, "certificate_path", path)
    from specprune.figures import certificate_path as path_figure  # draws; the other commands do without
    from specprune.figures import save_figure

    figure = path_figure.draw(path_figure.from_path(path))
    for file in save_figure(figure, options.out / "certificate_path"):
        _say(options, f"[{file}]")


def run_verify(options: argparse.Namespace) -> None:
    """Print the certificate that the network in a file earns on a data set."""
    _show(options, "verify", verified(options.file, options.data, options.data_dir, options.delta))


def run_double_descent(options: argparse.Namespace) -> None:
    """Compute and draw risk against size."""
    from specprune.figures import figures_of  # draws; the other commands do without
    from specprune.figures.registry import OVERPARAMETERISED

    _make_figures(options, options.names or figures_of(OVERPARAMETERISED), None)


def run_zoo(options: argparse.Namespace) -> None:
    """Train what is missing of a zoo, and print what is there."""
    dataset = load_dataset(options.data, options.data_dir)
    axes = dict(ZOO_GRIDS[options.grid])
    for axis in dataclasses.fields(ZooSetting):
        given = getattr(options, axis.name)
        if given is not None:
            axes[axis.name] = given
    found = train_zoo(
        dataset,
        zoo_grid(**axes),
        options.out,
        target_loss=options.target_loss,
        max_epochs=options.max_epochs,
        together=options.together,
        jobs=options.jobs,
        device=torch_device(options.device),
    )
    _show(options, "zoo-summary", found)


def run_measures(options: argparse.Namespace) -> None:
    """Print the measures of a network, rank them over a zoo, or list them."""
    names = options.names or None
    if options.zoo is not None:
        from specprune.figures import measure_ranking, measure_scatter, save_figure  # draws; others do without

        found = measured_zoo(
            options.zoo,
            options.data,
            options.data_dir,
            options.out / "measured.jsonl",
            names,
            jobs=options.jobs,
            seed=options.seed,
        )
        _show(options, "measures", found)
        table, label = found.table, f"{len(found.table)} networks"
        shown = measure_scatter.best_and_spectral(table, found.ranking)
        for name, figure in (
            ("measure_ranking", measure_ranking.draw(measure_ranking.from_ranking(found.ranking, label))),
            ("measure_scatter", measure_scatter.draw(measure_scatter.from_table(table, shown, label))),
        ):
            for path in save_figure(figure, options.out / name):
                _say(options, f"[{path}]")
    elif options.weights is None and options.model is None:
        print(to_json(registry_records()) if options.json else registry_table())
    else:
        _show(options, "measures", measured_problem(_problem(options), names, options.seed))


def run_figures(options: argparse.Namespace) -> None:
    """List the figures, or make some: of a network, or of one trained on the built-in digits."""
    from specprune.figures import FIGURES, GROUPS, figures_of  # draws; the other commands do without

    if not options.names:
        records = [
            {"group": group, "figure": name, "shows": FIGURES[name].title, "needs": FIGURES[name].needs}
            for group in GROUPS
            for name in figures_of(group)
        ]
        title = "specprune figures NAME ...|all --out DIR makes:"
        print(to_json(records) if options.json else format_table(records, title=title))
        return
    names = list(FIGURES) if "all" in options.names else options.names
    needed = any(FIGURES[name].needs == "network" for name in names)
    _make_figures(options, names, _figure_setting(options) if needed else None, tuple(options.format))


def _make_figures(
    options: argparse.Namespace,
    names: Sequence[str],
    setting: FigureSetting | None,
    formats: Sequence[str] = ("pdf", "png"),
) -> None:
    from specprune.figures import Conditions, make_figures  # draws; the other commands do without

    conditions = Conditions(options.seed, options.quick, torch_device(options.device))
    paths = make_figures(setting, options.out, names, conditions=conditions, formats=formats, command=options.words)
    print(to_json(paths) if options.json else "\n".join(str(path) for path in paths))


def _figure_setting(options: argparse.Namespace) -> FigureSetting:
    """Return the network and data that the options name; without a name, a network trained on the digits."""
    from specprune.figures import FigureSetting  # draws; the other commands do without

    shared: dict[str, Any] = {"calibration": options.calibration, "seed": options.seed}
    if options.quick:
        shared |= {**_QUICK, "calibration": min(options.calibration, _QUICK["calibration"])}
    if options.weights is None and options.model is None:
        dataset = load_dataset("digits").to(torch_device(options.device))
        recipe = default_recipe("digits", _QUICK_NET if options.quick else _DIGITS_NET, options.seed)
        if options.quick:
            recipe = dataclasses.replace(recipe, epochs=_QUICK_EPOCHS)
        trained = train(dataset, recipe, options.device)
        return FigureSetting(trained.model, dataset, f"digits, {recipe.net}", **shared)
    problem = _problem(options)
    if problem.dataset is None:
        raise ValueError("figures need a named data set, or a --data factory that returns a testbed Dataset")
    return FigureSetting(problem.model, problem.dataset, problem.label, **shared)


def run_latex(options: argparse.Namespace) -> None:
    """Write the statements and, of a network, the tables for a paper."""
    tables: dict[str, str] = {}
    if options.weights is not None or options.model is not None:
        problem = _problem(options)
        tables = paper_tables(
            problem,
            _prune(options, problem),
            calibration=options.calibration,
            keep=options.keep,
            delta=options.delta,
            input_radius=options.input_radius or problem.input_radius,
            seed=options.seed,
        )
    paths = write_latex(options.out, tables)
    print(to_json(paths) if options.json else "\n".join(str(path) for path in paths))


def run_report(options: argparse.Namespace) -> None:
    """Write one HTML page about a network: spectra with a slider for lambda, trade-off, bounds, pruning."""
    from specprune.figures import write_report  # draws; the other commands do without

    problem = _problem(options)
    data = report_data(
        problem,
        lambda: _prune(options, problem),
        data=str(options.data or (problem.recipe and problem.recipe.data)),
        calibration=options.calibration,
        with_tradeoff=not options.no_tradeoff,
        delta=options.delta,
        input_radius=options.input_radius or problem.input_radius,
        seed=options.seed,
    )
    _show(options, "report", data)
    write_report(data, options.out / "report.html")
    _say(options, f"[{options.out / 'report.html'}]")


def _prune(options: argparse.Namespace, problem: Problem, latency: bool = False) -> Pruned:
    return specprune.prune(
        problem.model,
        problem.calibration(options.calibration),
        keep=options.keep,
        method=getattr(options, "method", "spectral"),  # only `prune` offers others
        measure=options.measure,
        allocation=options.allocation,
        selection=options.selection,
        theta=options.theta,
        reconstruction=options.reconstruction,
        round_to=options.round_to,
        distill_steps=options.distill_steps,
        latency=latency,
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


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": run_demo,
    "data": run_data,
    "train": run_train,
    "spectra": run_spectra,
    "prune": run_prune,
    "compare": run_compare,
    "bounds": run_bounds,
    "tightness": run_tightness,
    "tradeoff": run_tradeoff,
    "certify": run_certify,
    "verify": run_verify,
    "double-descent": run_double_descent,
    "zoo": run_zoo,
    "measures": run_measures,
    "figures": run_figures,
    "report": run_report,
    "latex": run_latex,
}
