"""The gallery: what the theory says, and what was measured, drawn for print."""

from specprune.figures.gallery import FORMATS, make_figures, redraw, save_figure
from specprune.figures.registry import FIGURES, GROUPS, GalleryFigure, figures_of
from specprune.figures.report_data import ReportData, network_facts, prunable_nodes
from specprune.figures.report_page import write_report
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
    "ReportData",
    "figure_style",
    "figures_of",
    "make_figures",
    "network_facts",
    "new_figure",
    "prunable_nodes",
    "redraw",
    "save_figure",
    "write_report",
]
