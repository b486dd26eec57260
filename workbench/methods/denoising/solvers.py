"""Solvers by name, for whatever steps along a trajectory: stitches, schedules, searches."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from workbench.methods.denoising._dpm import multistep_step, singlestep_step
from workbench.methods.denoising._march import Solver
from workbench.methods.denoising.ddim import ddim_step
from workbench.methods.denoising.deis import deis_step
from workbench.methods.denoising.dpmpp_2m import dpmpp_2m_step
from workbench.methods.denoising.edm import edm_step
from workbench.methods.denoising.unipc import unipc_step


class Preset(NamedTuple):
    """A step function with its knobs fixed.

    evaluations: of a step, per row; a step into sigma 0 costs 1. is_multistep: it looks back on former steps.
    """

    step: Solver
    evaluations: int = 1
    is_multistep: bool = False


SOLVERS: dict[str, Preset] = {
    "ddim": Preset(ddim_step),
    "dpmpp_2m": Preset(dpmpp_2m_step, is_multistep=True),
    "dpmpp_2s": Preset(partial(singlestep_step, order=2), evaluations=2),
    "dpmpp_3m": Preset(partial(multistep_step, order=3), is_multistep=True),
    "unipc": Preset(unipc_step, is_multistep=True),
    "deis": Preset(partial(deis_step, variant="tab", degree=3), is_multistep=True),
    "ipndm": Preset(partial(deis_step, variant="ipndm", degree=3), is_multistep=True),
    "edm_heun": Preset(edm_step, evaluations=2),
}
MULTISTEP = tuple(name for name, preset in SOLVERS.items() if preset.is_multistep)


def nfe(solver: str, n_steps: int) -> int:
    """Evaluations per sample, without guidance, of n_steps steps of which the last goes into sigma 0."""
    return SOLVERS[solver].evaluations * (n_steps - 1) + 1
