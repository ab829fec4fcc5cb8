"""The API reference: a page for each area and for each module with public names, written from `__all__`.

Each public name has its description in one place, under the shortest path that one imports it from.  The other paths,
and bare names in docstrings, lead there.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from written import heading, write_pages

ROOT = "specprune"
#: In the order of the house: what comes later imports what comes before.
AREAS = ("bounds", "compress", "analysis", "figures", "testbed")
FOLDER = "api"


def public_names(package: ModuleType) -> dict[str, str]:
    """Return the module that each name of a package's `__all__` is imported from, in the order of the imports."""
    tree = ast.parse(inspect.getsource(package))
    found = {
        alias.name: str(node.module)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in package.__all__
    }
    missing = {name for name in package.__all__ if not name.startswith("__")} - set(found)
    if missing:
        raise ValueError(f"{package.__name__}: {sorted(missing)} in __all__, but not imported from a module")
    return found


def _homes() -> dict[str, dict[str, str]]:
    """Return, by package, its public names and the modules that define them."""
    packages = [ROOT, *(f"{ROOT}.{area}" for area in AREAS)]
    homes = {}
    for package in packages:
        names = public_names(importlib.import_module(package))
        # the package itself imports from the areas: ask those where a name is from
        homes[package] = {name: homes_of(module, name) for name, module in names.items()}
    return homes


def homes_of(module: str, name: str) -> str:
    """Return the module that defines a name, through packages that import it from there."""
    loaded = importlib.import_module(module)
    if hasattr(loaded, "__path__") and name in getattr(loaded, "__all__", ()):
        return homes_of(public_names(loaded)[name], name)
    return module


def documented_names() -> dict[str, str]:
    """Return where each path of a public name is described: `specprune.bounds.bound.Bound`: `specprune.bounds.Bound`.

    Data are described under the module that defines them, since their comments are read from there.
    """
    places: dict[str, str] = {}
    for package, names in _homes().items():
        for name, home in names.items():
            shortest = f"{package}.{name}"
            if not callable(getattr(importlib.import_module(home), name)):
                shortest = f"{home}.{name}"
            place = places.setdefault(f"{home}.{name}", shortest)
            places[f"{package}.{name}"] = place
    return places


def _value(place: str) -> Any:
    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _annotations(value: Any) -> Iterator[str]:
    """Yield the annotations, as they are written, of a function, or of a class and what is public in it."""
    yield from (str(text) for text in getattr(value, "__annotations__", {}).values())
    if inspect.isclass(value):
        for name, member in vars(value).items():
            function = next(
                (getattr(member, part) for part in ("fget", "func", "__func__") if hasattr(member, part)), member
            )
            if not name.startswith("_") and inspect.isfunction(function):
                yield from _annotations(function)


def _names_of(module: str) -> dict[str, Any]:
    """Return the names of a module, and those that only its annotations import."""
    loaded = importlib.import_module(module)
    names: dict[str, Any] = {}
    for block in (node for node in ast.parse(inspect.getsource(loaded)).body if isinstance(node, ast.If)):
        for node in (node for node in block.body if isinstance(node, ast.ImportFrom) and node.module):
            names |= {alias.name: getattr(importlib.import_module(node.module), alias.name) for alias in node.names}
    return {**names, **vars(loaded)}


def types_named(places: Iterable[str]) -> dict[str, list[str]]:
    """Return, by module, the public classes that annotations of these names speak of without being among them.

    They are what public functions return or take, and are described beside them.
    """
    seen, found = {id(_value(place)) for place in places}, set()
    todo = list(places)
    while todo:
        value = _value(place := todo.pop())
        module, _, name = place.rpartition(".")
        if callable(value):
            module, texts = value.__module__, list(_annotations(value))
        else:
            texts = [str(vars(importlib.import_module(module)).get("__annotations__", {}).get(name, ""))]
        known = _names_of(module)
        for word in set(re.findall(r"\w+", " ".join(texts))):
            for named in typing.get_args(known.get(word)) or (known.get(word),):  # an alias stands for several
                inside = inspect.isclass(named) and named.__module__.startswith(f"{ROOT}.")
                if inside and id(named) not in seen and not named.__name__.startswith("_"):
                    seen.add(id(named))
                    todo.append(f"{named.__module__}.{named.__qualname__}")
                    found.add(todo[-1])
    by_module: dict[str, list[str]] = {}
    for place in sorted(found):
        by_module.setdefault(place.rpartition(".")[0], []).append(place)
    return by_module


def _entry(place: str) -> str:
    value = _value(place)
    if inspect.isclass(value):
        return f".. autoclass:: {place}\n   :members:\n"
    if callable(value):
        return f".. autofunction:: {place}\n"
    return f".. autodata:: {place}\n   :no-value:\n"


def _summary(places: Iterable[str]) -> str:
    lines = [".. currentmodule:: None", "", ".. autosummary::", "   :signatures: none", ""]
    lines += [*(f"   ~{place}" for place in places), ""]
    return "\n".join(lines)


def _module(name: str, places: Iterable[str]) -> str:
    """Return the directive for a module's docstring; a function of the same name keeps the name to itself."""
    return f".. automodule:: {name}\n   :no-members:\n" + ("   :no-index:\n" if name in places else "")


def _toctree(pages: Iterable[str], *options: str) -> str:
    return "\n".join([".. toctree::", *(f"   {option}" for option in options), "", *(f"   {p}" for p in pages), ""])


def _first_line(module: str) -> str:
    return (inspect.getdoc(importlib.import_module(module)) or "").partition("\n\n")[0].replace("\n", " ")


def _area_pages(
    package: str, names: dict[str, str], places: dict[str, str], types: dict[str, list[str]]
) -> Iterator[tuple[str, str]]:
    """Yield the page of an area, with a table of its names module by module, and the pages of its modules."""
    by_module: dict[str, list[str]] = {module: [] for module in types if module.startswith(f"{package}.")}
    for name, home in names.items():
        by_module.setdefault(home, []).append(places[f"{package}.{name}"])
    modules = sorted(by_module)
    described = set(places.values())
    parts = [heading(package, "="), _module(package, ()), _toctree(modules, ":hidden:")]
    for module in modules:
        title = module.removeprefix(f"{package}.")
        own = sorted(place for place in by_module[module] if place.startswith(f"{package}."))
        elsewhere = sorted(set(by_module[module]) - set(own))
        parts += [heading(f":doc:`{title} <{module}>`", "-"), _escaped(_first_line(module)) + "\n"]
        parts += [_summary([*own, *elsewhere])] if own or elsewhere else []
        page = [heading(title, "="), _module(module, described), f".. currentmodule:: {package}\n"]
        page += [_entry(place) for place in own]
        if elsewhere:
            page += [f"Described with :doc:`{ROOT} <{ROOT}>` itself:\n", _summary(elsewhere)]
        if module in types:
            page += [heading("Types in these signatures", "-")] if by_module[module] else []
            page += [_entry(place) for place in types[module]]
        yield f"{module}.rst", "\n".join(page)
    yield f"{package}.rst", "\n".join(parts)


def write_api(app: Sphinx) -> None:
    """Write all pages of the reference."""
    homes, places = _homes(), documented_names()
    types = types_named(sorted(set(places.values())))
    first = sorted(places[f"{ROOT}.{name}"] for name in homes[ROOT])
    about = (
        "What most need is in ``specprune`` itself. The rest is in areas: ``analysis`` is built on ``compress``, and\n"
        "that on ``bounds``; ``figures`` draws what they compute, and ``testbed`` has data sets and networks.\n"
    )
    pages = {"index.rst": "\n".join([heading("API reference", "="), about, _toctree(homes, ":maxdepth: 1")])}
    pages[f"{ROOT}.rst"] = "\n".join([heading(ROOT, "="), _module(ROOT, ()), _summary(first), *map(_entry, first)])
    for area in AREAS:
        package = f"{ROOT}.{area}"
        pages.update(_area_pages(package, homes[package], places, types))
    write_pages(Path(app.srcdir) / FOLDER, pages)


def _escaped(text: str) -> str:
    """Escape the bars of absolute values: reStructuredText takes them for substitutions, and docstrings have none."""
    parts = re.split(r"(`+[^`]*`+)", text)
    return "".join(part if number % 2 else part.replace("|", "\\|") for number, part in enumerate(parts))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def readable(lines: list[str]) -> list[str]:
    """Return a docstring's lines with its formulas, set off by blanks and four spaces, as literal blocks."""
    found: list[str] = []
    text: list[str] = []
    base, formula = 0, False
    for number, line in enumerate([*lines, "end"]):
        after_blank = number == 0 or not lines[number - 1].strip()
        if line.strip() and after_blank:
            starts = not formula and _indent(line) >= base + 4
            if starts or (formula and _indent(line) < base + 4):
                found += text if formula else _escaped("\n".join(text)).split("\n")
                found += [" " * base + "::", ""] if starts else []
                text, formula = [], starts
        if line.strip() and not formula:
            base = _indent(line)
        text.append(line)
    return found + (text if formula else _escaped("\n".join(text)).split("\n"))[:-1]


def process_docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Answer autodoc's event `autodoc-process-docstring`."""
    lines[:] = readable(lines)
    if what in ("property", "attribute", "data"):  # napoleon takes what is before a colon in the first line for a type
        lines.insert(0, "")


def name_attributes(app: Sphinx, doctree: nodes.document) -> None:
    """Answer Sphinx's event `doctree-read`: the fields of a dataclass are no "variables"."""
    for name in list(doctree.findall(nodes.field_name)):
        if name.astext() == "Variables":
            name.replace_self(nodes.field_name("", "Attributes"))


class Resolver:
    """Leads every path of a public name, and bare names in docstrings, to its description."""

    def __init__(self) -> None:
        self.places = documented_names()
        self.bare: dict[str, str] = {}
        for place in self.places.values():
            name = place.rpartition(".")[2]
            # a single small word in a docstring is mostly an argument: `train` is not the function
            if name.lower() != name or "_" in name or place == f"{ROOT}.{name}":
                self.bare.setdefault(name, place)

    def place(self, target: str) -> str | None:
        """Return where a target is described, with what follows it: `Bound.value` is in `specprune.bounds.Bound`."""
        name, dot, rest = target, "", ""
        while name:
            found = self.places.get(name) or self.bare.get(name)
            if found is not None:
                return f"{found}{dot}{rest}"
            name, _, last = name.rpartition(".")
            dot, rest = ".", f"{last}{dot}{rest}"
        return None

    def __call__(self, app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Any) -> nodes.reference | None:
        """Answer Sphinx's event `missing-reference`."""
        target = node.get("reftarget", "")
        place = self.place(target) if node.get("refdomain") == "py" else None
        if place is None or place == target:
            return None
        domain = env.get_domain("py")
        return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", place, node, content)  # type: ignore[return-value]


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.connect("builder-inited", write_api, priority=100)  # before autosummary looks at the pages
    app.connect("missing-reference", Resolver())
    app.connect("doctree-read", name_attributes)
    app.connect("autodoc-process-docstring", process_docstring, priority=100)  # before napoleon
    return {"parallel_read_safe": True}
