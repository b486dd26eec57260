"""Sampling Workbench: how few steps, how small a model, how many drafts, and what does it cost?"""

__version__ = "0.2.0"

from workbench import methods
from workbench.cost import Cost, Counted, Timing
from workbench.family import FAMILIES, Family
from workbench.frontier import cheapest, paired, pareto, points
from workbench.knob import Knob
from workbench.problem import Problem
from workbench.quality import METRICS, Metric, Quality, register_metric
from workbench.registry import METHODS, Step, get, method
from workbench.runs import Cancelled, Inputs, Run, compared, inputs, run, timed
from workbench.store import Store
from workbench.sweeps import Memo, sweep, together

__all__ = [
    "FAMILIES", "METHODS", "METRICS", "Cancelled", "Cost", "Counted", "Family", "Inputs", "Knob", "Memo",
    "Metric", "Problem", "Quality", "Run", "Step", "Store", "Timing", "cheapest", "compared", "get", "inputs",
    "method", "methods", "paired", "pareto", "points", "register_metric", "run", "sweep", "timed", "together",
]
