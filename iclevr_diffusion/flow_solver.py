from collections.abc import Mapping
from typing import Any

from diffusers import DPMSolverMultistepScheduler


def straight_path(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings by which diffusers' solvers follow the path of a flow model that has a scheduler of `config`.

    What FlowMatch schedulers call `shift` is `flow_shift` here.
    """
    shift = config.get("shift", config.get("flow_shift", 1.0))
    return {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}


def make_flow_solver(time_shift: float, solver_order: int) -> DPMSolverMultistepScheduler:
    """Makes a DPM-Solver++ for networks that predict a flow's velocity.

    *DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models* (Lu et al., 2022,
    https://arxiv.org/abs/2211.01095). With order 1 it takes straight steps along the predicted velocity, as Euler's
    method does. Its times are such that those of n steps are among those of any multiple of n.

    Args:
        time_shift: How far the times are moved towards noise, see `diffusion.shift_times`.
        solver_order: 1 or 2.
    """
    return DPMSolverMultistepScheduler(
        solver_order=solver_order, final_sigmas_type="zero", **straight_path({"shift": time_shift})
    )
