"""Panoptic predictions as pictures and in COCO's form: what `crbp predict` leaves behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image

from crbp._files import write_whole
from crbp.analysis.overlay import overlay
from crbp.data.panoptic import Categories, png, read_image, rgb_from_ids
from crbp.models.panoptic import PanopticResult
from crbp.tasks.panoptic_pictures import check_apart

if TYPE_CHECKING:
    from crbp.tasks.panoptic_pictures import PanopticBatch


class PanopticPredictionWriter(BasePredictionWriter):
    """Write what `PanopticTask.predict_step` returns, three files an image, named after it or its number.

    ``NAME.png`` shows the segments over the image with contours, class names and a legend; ``NAME_panoptic.png`` is the
    map in COCO's colours, ``id = R + 256 G + 256² B``; ``NAME.json`` lists its segments: id, category, name, score of
    things, area in pixels.

    Args:
        folder: where to write; made if it does not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(write_interval="batch")
        self.folder = Path(folder)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to write over the pictures."""
        check_apart(self.folder, getattr(trainer.datamodule, "predict", None))  # type: ignore[attr-defined]

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: list[PanopticResult],
        batch_indices: Sequence[Any] | None,
        batch: PanopticBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch."""
        categories: Categories = pl_module.categories  # type: ignore[assignment]
        files: Sequence[Path | None] = batch.files or [None] * len(batch.images)
        for result, image, target, file in zip(prediction, batch.images, batch.targets, files, strict=True):
            if file is None:
                height, width = result.panoptic.shape
                seen = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
                picture = seen.resize((width, height), Image.Resampling.BILINEAR)
                name = f"{target['image_id']:012d}"
            else:
                picture, name = read_image(file), file.stem  # what the network saw was resized
            self._write(name, result, picture, pl_module.segments(result), categories)  # type: ignore[operator]

    def _write(
        self, name: str, result: PanopticResult, image: Image.Image, segments: list[dict[str, Any]], of: Categories
    ) -> None:
        ids = result.panoptic.cpu().numpy()
        names = {category: of.name(category) for category in (*of.things, *of.stuff)}
        colours = {category: of.colour(category) for category in names}
        shown = np.asarray(overlay(np.asarray(image), ids, segments, names, colours))
        write_whole(self.folder / f"{name}.png", png(shown), sync=False)
        write_whole(self.folder / f"{name}_panoptic.png", png(rgb_from_ids(ids)), sync=False)
        listed = [
            {**segment, "name": names[segment["category_id"]], "area": int(found["area"])}
            for segment, found in zip(segments, result.segments, strict=True)
        ]
        content = {"height": ids.shape[0], "width": ids.shape[1], "segments_info": listed}
        write_whole(self.folder / f"{name}.json", (json.dumps(content, indent=2) + "\n").encode(), sync=False)
