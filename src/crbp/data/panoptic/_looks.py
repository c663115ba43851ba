"""How things of generated shapes may look and lie; apart from what draws them, which needs Numba."""

from typing import Literal

Looks = Literal["textured", "plain", "coloured"]
ALIKE = 0.25  # share of the things proposed that are laid over one that looks the same, by default
ACROSS = 0.25  # and of those laid across a long one
