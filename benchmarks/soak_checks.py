"""What `soak.py` compares: whether files are whole, and whether two runs left the same."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

_ONE_PER_LEG = ("events.out.tfevents", "log.txt", "seconds")


def broken_files(folder: Path) -> list[str]:
    """The files that cannot be read, apart from unfinished ones, whose names say so."""
    found = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.startswith((".", *_ONE_PER_LEG)):
            continue
        try:
            if not path.stat().st_size:
                raise ValueError("empty")
            _READERS.get(path.suffix, Path.read_bytes)(path)
        except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, yaml.YAMLError) as error:
            found.append(f"{path.relative_to(folder)}: {error}")
    return found


def _picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()


def _page(path: Path) -> None:
    if not path.read_text().rstrip().endswith("</html>"):
        raise ValueError("cut short")


def _configuration(path: Path) -> None:
    if path.name == "config.yaml" and not {"model", "data", "trainer"} <= set(yaml.safe_load(path.read_text()) or ()):
        raise ValueError("cut short")


_READERS: dict[str, Any] = {
    ".ckpt": lambda path: torch.load(path, weights_only=True),
    ".safetensors": load_file,
    ".png": _picture,
    ".json": lambda path: json.loads(path.read_text()),
    ".npy": lambda path: np.load(path, allow_pickle=False),
    ".parquet": pq.read_table,
    ".html": _page,
    ".yaml": _configuration,
}


def step_of(checkpoint: Path) -> int:
    """The optimiser step that a checkpoint is of."""
    return int(torch.load(checkpoint, weights_only=True)["global_step"])


def fit_result(run: Path) -> dict[str, Any]:
    """All that a training run leaves: its checkpoints value by value, its weights, and every number logged."""
    found: dict[str, Any] = {}
    for name in ("last", "best"):
        state = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        for callback in state["callbacks"].values():
            callback.pop("current_score", None)  # Lightning saves it and never reads it
        found |= {f"{name}.ckpt{key}": value for key, value in _leaves(state, str(run))}
    for path in sorted((run / "weights").glob("*.safetensors")):
        found |= {f"{path.name}{key}": value for key, value in _leaves(load_file(path), str(run))}
        with safe_open(path, framework="pt") as file:
            found |= {f"{path.name} {key}": value for key, value in file.metadata().items()}
    for events in sorted(run.glob("events.out.tfevents*")):
        log = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
        for tag in log.Tags()["scalars"]:
            found |= {f"{tag} at {each.step}": str(each.value) for each in log.Scalars(tag)}
    return found


def folder_result(folder: Path) -> dict[str, Any]:
    """The content of every file, unfinished ones of a kill left out."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if not path.name.startswith((".", *_ONE_PER_LEG))
    }


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The names, at most ten, under which two results are not the same."""
    names = sorted(found.keys() | wanted.keys())
    return [name for name in names if found.get(name) != wanted.get(name)][:10]


def _leaves(value: Any, run: str, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a checkpoint under its path; tensors as their bytes, paths without the folder of the run."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _leaves(each, run, f"{key}/{str(name).replace(run, 'RUN')}")
    elif isinstance(value, list | tuple):
        for place, each in enumerate(value):
            yield from _leaves(each, run, f"{key}/{place}")
    elif isinstance(value, torch.Tensor):
        content = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        yield key, f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    else:
        yield key, str(value).replace(run, "RUN")
