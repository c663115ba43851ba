"""Every setting of a Pathfinder image, named, checked once, and hashed: the config is the data set's identity."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

# Changing what an image looks like for a given config must change this number: it keys caches and streams.
STREAM_VERSION = 1

_RENDERING = ("image_size", "contrast", "anti_alias", "mask_threshold")
_LIMITS = ("dash_tries", "contour_tries", "image_tries")


@dataclass(frozen=True, kw_only=True)
class PathfinderConfig:
    """The settings of one contour-tracing task; lengths are in pixels of the `window`.

    A scene is laid out in a square of `window` × `window` pixels and drawn as an image of `image_size` ×
    `image_size` pixels, each the mean of at least (`anti_alias` · `window` / `image_size`)² samples. The
    defaults are the published ones. Scenes do not depend on how they are drawn: two configs that differ
    in `image_size`, `contrast`, `anti_alias` or `mask_threshold` alone show the same scenes.

    Args:
        contour_length: Dashes of each long contour.
        image_size: Height and width of the images, in output pixels.
        window: Height and width of the scene.
        padding: Width of the border that no dash enters.
        dash_length: Length of a dash.
        dash_thickness: Thickness of a dash.
        dash_margin: Half the gap between two dashes of a contour.
        clearance: Least gap between two contours; `None` is `dash_margin`, as published.
        continuity: A contour bends by at most π / (2 · `continuity`) from dash to dash.
        seed_distance: Least distance between the starting points of two contours.
        marker_radius: Radius of the disc on the end of a long contour.
        n_contours: Long contours, the target among them.
        distractor_length: Dashes of each distractor; `None` is `contour_length` // 3, at least 1.
        n_distractors: Distractors.
        contrast: Brightness of dashes and discs; the background is 0.
        anti_alias: Samples per window pixel and axis.
        mask_threshold: A pixel is in the mask where the target covers more than this share of it.
        form: `"segmentation"` (one disc; label 0) or `"classification"` (two discs; label 1 where both
            are on the same contour, else 0).
        dash_tries: Heads drawn for a dash before its contour is given up.
        contour_tries: Starting points tried for a contour before its image is given up.
        image_tries: Scenes tried before `GenerationError`.

    Raises:
        ValueError: A setting is out of range; the message names the value, the range and the remedy.

    Source: Linsley et al., NeurIPS 2020, arXiv 2005.11362 (task and settings).
    """

    contour_length: int = 14
    image_size: int = 150
    window: int = 300
    padding: float = 22.0
    dash_length: float = 5.0
    dash_thickness: float = 2.0
    dash_margin: float = 3.0
    clearance: float | None = None
    continuity: float = 1.8
    seed_distance: float = 27.0
    marker_radius: float = 5.0
    n_contours: int = 2
    distractor_length: int | None = None
    n_distractors: int = 15
    contrast: float = 1.0
    anti_alias: int = 2
    mask_threshold: float = 0.2
    form: Literal["segmentation", "classification"] = "segmentation"
    dash_tries: int = 4
    contour_tries: int = 500
    image_tries: int = 50

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), str(field.type))
            if "float" in str(field.type) and getattr(self, field.name) is not None:
                # 22 and 22.0 are one config, so one digest
                object.__setattr__(self, field.name, float(getattr(self, field.name)))
        self._check_ranges()
        self._check_geometry()

    def _check_ranges(self) -> None:
        _within("contour_length", self.contour_length, 2, 1000, "count the dashes of a long contour")
        _within("image_size", self.image_size, 8, 4096, "choose the size of the image in pixels")
        _within("window", self.window, 16, 4096, "keep 300 and set image_size for another resolution")
        _within("dash_length", self.dash_length, 0.5, 100, "the published length is 5 in a window of 300")
        _within("dash_thickness", self.dash_thickness, 0.25, 50, "the published thickness is 2")
        _within("dash_margin", self.dash_margin, 0.25, 50, "the published margin is 3")
        _within("contour_gap", self.contour_gap, 0.25, 50, "set clearance, or leave it None")
        _within("continuity", self.continuity, 1, 20, "below 1 a contour could fold back on itself")
        _within("seed_distance", self.seed_distance, 0, self.window, "the published distance is 27")
        _within("n_contours", self.n_contours, 1, 100, "the published number is 2")
        _within("n_distractors", self.n_distractors, 0, 1000, "the published number is 15")
        _within("distractor_dashes", self.distractor_dashes, 1, 1000, "set distractor_length to 1 or more")
        _within("contrast", self.contrast, 1 / 255, 1, "1 draws in white")
        _within("anti_alias", self.anti_alias, 1, 16, "the published scale is 2")
        _within("mask_threshold", self.mask_threshold, 0, 0.99, "the published threshold is 0.2")
        for name in _LIMITS:
            _within(name, getattr(self, name), 1, 1_000_000, "it bounds the work spent on one image")
        if self.form not in ("segmentation", "classification"):
            raise ValueError(f"form={self.form!r} is unknown; use 'segmentation' or 'classification'")

    def _check_geometry(self) -> None:
        _within(
            "marker_radius",
            self.marker_radius,
            self.dash_thickness / 2,
            self.dash_length + self.dash_margin,
            "a larger disc would hide the next dash; lengthen dash_length or dash_margin",
        )
        _within(
            "padding",
            self.padding,
            max(self.marker_radius, self.dash_thickness),
            self.window / 2 - self.dash_length,
            "discs must fit in the border, and a dash between the borders; change padding or window",
        )
        if self.form == "classification" and self.n_contours < 2:
            raise ValueError(
                f"n_contours={self.n_contours} is too few for form='classification', which marks two "
                "contours when the label is 0; set n_contours to 2 or more"
            )

    @property
    def distractor_dashes(self) -> int:
        """Dashes of each distractor, with the default filled in."""
        if self.distractor_length is not None:
            return self.distractor_length
        return max(1, self.contour_length // 3)

    @property
    def contour_gap(self) -> float:
        """Least gap between two contours, with the default filled in."""
        return self.dash_margin if self.clearance is None else self.clearance

    @property
    def digest(self) -> str:
        """Hexadecimal digest of all that decides an image but split, seed and index: the key of caches."""
        return _digest(self._resolved()).hex()

    @property
    def scene_digest(self) -> str:
        """Hexadecimal digest of the settings that lay a scene out, without those that only draw it."""
        return _digest({k: v for k, v in self._resolved().items() if k not in _RENDERING}).hex()

    def _resolved(self) -> dict[str, Any]:
        return {
            **self.to_dict(),
            "distractor_length": self.distractor_dashes,
            "clearance": self.contour_gap,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, so that `PathfinderConfig(**config.to_dict()) == config`."""
        return asdict(self)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> PathfinderConfig:
        """Return the named task, with `overrides` put in place of its settings.

        Args:
            name: One of `PRESETS`: `pf6` … `pf25` at the published settings; `mini` (32 × 32, 5 dashes),
                `mini48` (9 dashes) and `mini64` (14 dashes) drawn at that scale, to train in minutes; `small5`,
                `small9` and `small14`, contours of so many dashes in 48 × 48 pixels.
            **overrides: Settings of `PathfinderConfig`.

        Raises:
            ValueError: No such preset.
            TypeError: An override is not a setting.
        """
        if name not in PRESETS:
            raise ValueError(f"preset={name!r} is unknown; choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


# Drawn at the scale they are seen at, so lengths are those of a pixel: a dash of two or three pixels, a gap
# that leaves a dark pixel between, and other contours kept farther away than the next dash of the same one.
_MINI: dict[str, Any] = {
    "padding": 3.0,
    "dash_length": 2.0,
    "dash_thickness": 1.3,
    "dash_margin": 0.5,
    "clearance": 1.6,
    "continuity": 2.2,
    "seed_distance": 8.0,
    "marker_radius": 2.4,
}

PRESETS: dict[str, dict[str, Any]] = {
    **{f"pf{length}": {"contour_length": length} for length in (6, 9, 14, 20, 25)},
    "mini": {"window": 32, "image_size": 32, "contour_length": 5, "distractor_length": 2, "n_distractors": 4, **_MINI},
    # Three lengths in one frame: one task, easy to hard.
    **{
        f"small{length}": {"window": 48, "image_size": 48, "contour_length": length, "n_distractors": 6, **_MINI}
        for length in (5, 9, 14)
    },
    "mini48": {"window": 48, "image_size": 48, "contour_length": 9, "n_distractors": 6, **_MINI},
    "mini64": {"window": 64, "image_size": 64, "contour_length": 14, "n_distractors": 7, **_MINI},
}


@lru_cache(maxsize=256)  # asked for at every image
def stream_key(config: PathfinderConfig, *, split: str, seed: int) -> tuple[int, int]:
    """Return the 128-bit key of the images of one split, as two unsigned 64-bit integers.

    Raises:
        ValueError: The split is unknown or the seed is not an integer in [0, 2⁶³).
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r} is not an integer from 0 to 2**63 - 1; choose another seed")
    key = _digest({"scene": config.scene_digest, "split": split, "seed": seed})
    return int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")


def _digest(values: dict[str, Any]) -> bytes:
    text = json.dumps({"version": STREAM_VERSION, **values}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _check_type(name: str, value: Any, kind: str) -> None:
    """Refuse what JSON or YAML may have turned into another type, before a range check reads it."""
    if value is None and "None" in kind:
        return
    if kind.startswith("int") and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{name}={value!r} is not a whole number; give an int")
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if kind.startswith("float") and not (number and math.isfinite(value)):
        raise ValueError(f"{name}={value!r} is not a finite number; give a float")


def _within(name: str, value: float, low: float, high: float, remedy: str) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}={value} is outside [{low:g}, {high:g}]: {remedy}")
