"""How Sphinx builds the documentation: `make docs`.

`_ext` writes what would go stale if it were written by hand: reference, command line, examples, figures.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import specprune

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "specprune"
author = copyright = "The specprune developers"
release = version = specprune.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",  # formulas need the network when they are read; without it one sees their TeX
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
    "api_pages",
    "command_pages",
    "example_pages",
    "figure_pages",
]
exclude_patterns = ["_build", "_scripts", "tables"]
nitpicky = True
# Names of other packages: their documentation would be needed, and with it the network.
nitpick_ignore_regex = [("py:.*", r"(?!specprune\.).*")]
default_role = "py:obj"  # `name` in a docstring: a link where it is one of ours, else code

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]

sphinx_gallery_conf = {
    "examples_dirs": "_scripts",
    "gallery_dirs": "examples",
    "filename_pattern": r"\d_",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "write_computation_times": False,
    "show_signature": False,
    "plot_gallery": "True",
}
# Figures are drawn into files, and no window opens.
warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")

html_theme = "furo"
html_title = "specprune"
html_static_path = ["_static"]
html_css_files = ["specprune.css"]
html_copy_source = False
