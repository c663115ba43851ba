"""How things of generated shapes may look; apart from what draws them, which needs Numba."""

from typing import Literal

Looks = Literal["textured", "plain", "coloured"]
