"""Panoptic FPN and its recurrent variant R-FPN, built from torchvision's detection parts, set to do as detectron2's."""

from importlib.util import find_spec

_NEEDED = ("torchvision", "numpy")
if _missing := [name for name in _NEEDED if find_spec(name) is None]:
    raise ImportError(
        f"crbp.models.panoptic needs {', '.join(_missing)}, not installed here; run: pip install 'crbp[panoptic]'"
    )

from crbp.models.panoptic.checkpoints import CheckpointError, load_weights  # noqa: E402
from crbp.models.panoptic.merge import merge_panoptic  # noqa: E402
from crbp.models.panoptic.panoptic_fpn import RFPN, PanopticFPN  # noqa: E402
from crbp.models.panoptic.results import PanopticResult, paste_masks  # noqa: E402
from crbp.models.panoptic.settings import (  # noqa: E402
    BackboneSettings,
    BoxSettings,
    MaskSettings,
    MergeSettings,
    PixelSettings,
    ProposalSettings,
    SemanticSettings,
    mini_settings,
)
from crbp.models.panoptic.summary import Part, parts  # noqa: E402

__all__ = [
    "RFPN",
    "BackboneSettings",
    "BoxSettings",
    "CheckpointError",
    "MaskSettings",
    "MergeSettings",
    "PanopticFPN",
    "PanopticResult",
    "Part",
    "PixelSettings",
    "ProposalSettings",
    "SemanticSettings",
    "load_weights",
    "merge_panoptic",
    "mini_settings",
    "parts",
    "paste_masks",
]
