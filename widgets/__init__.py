"""What draws Runs: the live explorer and static figures. UI packages are imported only here."""

from widgets.acceptance import acceptance_explorer
from widgets.explorer import Explorer, explorer
from widgets.frontier import curve_plot, frontier_plot, save_figure
from widgets.trees import tree_explorer

__all__ = [
    "Explorer", "acceptance_explorer", "curve_plot", "explorer", "frontier_plot",
    "save_figure", "tree_explorer",
]
