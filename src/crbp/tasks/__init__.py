"""Training tasks: what Lightning's trainer is given to train, on which data, and what is kept of the result."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

_NEEDED = ("lightning", "jsonargparse", "torchmetrics", "safetensors", "PIL")
if _missing := [name for name in _NEEDED if find_spec(name) is None]:
    raise ImportError(f"crbp.tasks needs {', '.join(_missing)}, not installed here; run: pip install 'crbp[train]'")

from crbp.tasks._resume import WholeCheckpoints  # noqa: E402
from crbp.tasks.contour import ContourTask  # noqa: E402
from crbp.tasks.data import ContourData, ContourSource, Folders, Generated, Stages  # noqa: E402
from crbp.tasks.finite import NonFinite  # noqa: E402
from crbp.tasks.learning import LearningCheck  # noqa: E402
from crbp.tasks.penalties import FrobeniusPenalty, LipschitzPenalty, Penalty  # noqa: E402
from crbp.tasks.predictions import PredictionWriter  # noqa: E402
from crbp.tasks.weights import Origin, SafetensorsExport, WeightsError, load_net, load_trained, save_net  # noqa: E402

if TYPE_CHECKING:
    from crbp.tasks.panoptic import PanopticTask
    from crbp.tasks.panoptic_data import (
        Coco,
        CocoFiles,
        CocoSource,
        GeneratedShapes,
        PanopticData,
        PanopticSource,
    )
    from crbp.tasks.panoptic_pictures import PanopticBatch
    from crbp.tasks.panoptic_predictions import PanopticPredictionWriter

_PANOPTIC = {  # found when asked for: contour tracing does without torchvision, whose import takes seconds
    **dict.fromkeys(
        ("Coco", "CocoFiles", "CocoSource", "GeneratedShapes", "PanopticData", "PanopticSource"), "panoptic_data"
    ),
    "PanopticBatch": "panoptic_pictures",
    "PanopticPredictionWriter": "panoptic_predictions",
    "PanopticTask": "panoptic",
}

__all__ = [
    "Coco",
    "CocoFiles",
    "CocoSource",
    "ContourData",
    "ContourSource",
    "ContourTask",
    "Folders",
    "FrobeniusPenalty",
    "Generated",
    "GeneratedShapes",
    "LearningCheck",
    "LipschitzPenalty",
    "NonFinite",
    "Origin",
    "PanopticBatch",
    "PanopticData",
    "PanopticPredictionWriter",
    "PanopticSource",
    "PanopticTask",
    "Penalty",
    "PredictionWriter",
    "SafetensorsExport",
    "Stages",
    "WeightsError",
    "WholeCheckpoints",
    "load_net",
    "load_trained",
    "save_net",
]


def __getattr__(name: str) -> Any:
    if name in _PANOPTIC:
        return getattr(import_module(f"crbp.tasks.{_PANOPTIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
