"""Training tasks: what Lightning's trainer is given to train, on which data, and what is kept of the result."""

from importlib.util import find_spec

_NEEDED = ("lightning", "jsonargparse", "torchmetrics", "safetensors", "PIL")
if _missing := [name for name in _NEEDED if find_spec(name) is None]:
    raise ImportError(f"crbp.tasks needs {', '.join(_missing)}, not installed here; run: pip install 'crbp[train]'")

from crbp.tasks.contour import ContourTask  # noqa: E402
from crbp.tasks.data import ContourData, ContourSource, Folders, Generated, Stages  # noqa: E402
from crbp.tasks.penalties import FrobeniusPenalty, LipschitzPenalty, Penalty  # noqa: E402
from crbp.tasks.predictions import PredictionWriter  # noqa: E402
from crbp.tasks.weights import Origin, SafetensorsExport, WeightsError, load_net, load_trained, save_net  # noqa: E402

__all__ = [
    "ContourData",
    "ContourSource",
    "ContourTask",
    "Folders",
    "FrobeniusPenalty",
    "Generated",
    "LipschitzPenalty",
    "Origin",
    "Penalty",
    "PredictionWriter",
    "SafetensorsExport",
    "Stages",
    "WeightsError",
    "load_net",
    "load_trained",
    "save_net",
]
