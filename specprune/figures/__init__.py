"""The figures of a trained network: what the theory says about it, measured, drawn for print."""

from specprune.figures.gallery import FIGURES, make_figures, redraw, save_figure
from specprune.figures.setting import FigureSetting
from specprune.figures.style import figure_style, new_figure

__all__ = ["FIGURES", "FigureSetting", "figure_style", "make_figures", "new_figure", "redraw", "save_figure"]
