"""Predictions as pictures: what `crbp predict` leaves behind."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor

from crbp._files import write_whole


class PredictionWriter(BasePredictionWriter):
    """Write what `ContourTask.predict_step` returns as 8-bit grey PNG files, 255 for a probability of 1.

    Image ``i`` of the data set becomes ``<folder>/000000i.png``, and with ``predict_steps`` its steps
    ``<folder>/000000i_step001.png`` and on. Processes of a distributed run write their own images.

    Args:
        folder: where to write; made if it does not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(write_interval="batch")
        self.folder = Path(folder)

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: dict[str, Tensor],
        batch_indices: Sequence[Any] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch."""
        assert batch_indices is not None
        for row, index in enumerate(batch_indices):
            number = index[0] if isinstance(index, tuple) else index  # a sampler's `Key` starts with the index
            _write(prediction["probability"][row], self.folder / f"{number:07d}.png")
            for step, frame in enumerate(prediction["steps"][row] if "steps" in prediction else (), start=1):
                _write(frame, self.folder / f"{number:07d}_step{step:03d}.png")


def _write(probability: Tensor, path: Path) -> None:
    content = io.BytesIO()
    Image.fromarray((probability * 255).round().byte().cpu().numpy()).save(content, "PNG")
    write_whole(path, content.getbuffer(), sync=False)
