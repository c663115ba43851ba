"""What a trained model does over its steps: how well it traces, whether it settles, when it reaches each pixel."""

from importlib.util import find_spec

_NEEDED = ("scipy", "matplotlib")
if _missing := [name for name in _NEEDED if find_spec(name) is None]:
    raise ImportError(f"crbp.analysis needs {', '.join(_missing)}, not installed here; run: pip install 'crbp[train]'")

from crbp.analysis.animation import tracing_frames, tracing_gif  # noqa: E402
from crbp.analysis.evidence import evidential_uncertainty, reaction_time  # noqa: E402
from crbp.analysis.memory import memory_curve  # noqa: E402
from crbp.analysis.states import StateSpace, state_space  # noqa: E402
from crbp.analysis.trajectory import Trajectory, arrival_steps, follow, late_radius, penalty_curve  # noqa: E402

__all__ = [
    "StateSpace",
    "Trajectory",
    "arrival_steps",
    "evidential_uncertainty",
    "follow",
    "late_radius",
    "memory_curve",
    "penalty_curve",
    "reaction_time",
    "state_space",
    "tracing_frames",
    "tracing_gif",
]
