"""What a trained model does over its steps: how well it traces, whether it settles, when it reaches each pixel."""

from crbp.analysis.memory import memory_curve
from crbp.analysis.trajectory import Trajectory, arrival_steps, follow

__all__ = ["Trajectory", "arrival_steps", "follow", "memory_curve"]
