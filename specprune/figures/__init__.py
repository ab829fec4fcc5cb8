"""The gallery: what the theory says, and what was measured, drawn for print."""

from specprune.figures.gallery import FORMATS, make_figures, redraw, save_figure
from specprune.figures.registry import FIGURES, GROUPS, GalleryFigure, figures_of
from specprune.figures.setting import Conditions, FigureSetting, Parts
from specprune.figures.style import figure_style, new_figure

__all__ = [
    "FIGURES",
    "FORMATS",
    "GROUPS",
    "Conditions",
    "FigureSetting",
    "GalleryFigure",
    "Parts",
    "figure_style",
    "figures_of",
    "make_figures",
    "new_figure",
    "redraw",
    "save_figure",
]
