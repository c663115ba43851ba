"""Pathfinder (contour tracing): a seeded generator, its torch data set, and what reads and writes folders of it."""

from typing import TYPE_CHECKING, Any

from crbp.data._extras import require

require("numpy", "numba", "rich")

from crbp.data.errors import DataError  # noqa: E402
from crbp.data.pathfinder.config import PRESETS, PathfinderConfig  # noqa: E402
from crbp.data.pathfinder.dataset import Pathfinder, Sample  # noqa: E402
from crbp.data.pathfinder.generator import Batch, GenerationError, Scene, generate_batch, scene  # noqa: E402
from crbp.data.pathfinder.readers import FolderPathfinder, Skipped  # noqa: E402

if TYPE_CHECKING:
    from crbp.data._files import Written
    from crbp.data.pathfinder.writer import verify, write

__all__ = [
    "PRESETS",
    "Batch",
    "DataError",
    "FolderPathfinder",
    "GenerationError",
    "Pathfinder",
    "PathfinderConfig",
    "Sample",
    "Scene",
    "Skipped",
    "Written",
    "generate_batch",
    "scene",
    "verify",
    "write",
]


def __getattr__(name: str) -> Any:
    if name in ("Written", "verify", "write"):  # needs Pillow and pyarrow, which generating does without
        from crbp.data.pathfinder import writer

        return getattr(writer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
