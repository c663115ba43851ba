"""Files that `torch.save` wrote, read without running what is in them and without blowing up."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch


def load_plain(path: Path, *, admitted: tuple[Any, ...] = ()) -> Any:
    """What is in the file: tensors, numbers, texts and containers of them.

    Args:
        path: of the file.
        admitted: what else may be made, as `torch.serialization.safe_globals` takes it.

    Raises:
        Exception: of any kind, where the file is broken or asks for anything else.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed, as torch never does, and could take any memory")
    with torch.serialization.safe_globals(list(admitted)):
        return torch.load(path, map_location="cpu", weights_only=True)
