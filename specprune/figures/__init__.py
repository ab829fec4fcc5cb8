"""The figures of a trained network: what the theory says about it, measured, drawn for print."""

from specprune.figures.gallery import FIGURES, make_figures, redraw, save_figure
from specprune.figures.report_data import ReportData, network_facts, prunable_nodes
from specprune.figures.report_page import write_report
from specprune.figures.setting import FigureSetting
from specprune.figures.style import figure_style, new_figure

__all__ = [
    "FIGURES",
    "FigureSetting",
    "ReportData",
    "figure_style",
    "make_figures",
    "network_facts",
    "new_figure",
    "prunable_nodes",
    "redraw",
    "save_figure",
    "write_report",
]
