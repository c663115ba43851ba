"""The readers of crbp, each with good files to spoil and what is read of them; `fuzz.py` runs them."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import fuzz_mutations as bad
import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import crbp
from crbp import hub
from crbp._card import written_card
from crbp.data.panoptic import Categories, CocoPanoptic, Resize, check, rgb_from_ids
from crbp.data.pathfinder import FolderPathfinder, PathfinderConfig, generate_batch, verify, write
from crbp.metrics.panoptic_files import evaluate_panoptic_files
from crbp.models import PathfinderNet
from crbp.models.panoptic._unpickle import read_checkpoint, tensors
from crbp.tasks import ContourTask, LipschitzPenalty, Origin, load_net, save_net
from crbp.tasks.command_line import _CommandLine
from crbp.tasks.panoptic_data import Pictures
from crbp.tasks.weights import load_trained

Spoil = Callable[[Random, bytes], bytes]
CANARY = "canary"  # made by a file that could run code


@dataclass(frozen=True)
class Reader:
    """What is fuzzed.

    Attributes:
        make: writes good files into a folder.
        spoil: which of them are spoilt, and how; bytes are in any case.
        read: reads them all; whether it could is not the question.
        cost: about what a case takes in milliseconds, by which cases are shared out.
    """

    make: Callable[[Path], None]
    spoil: tuple[tuple[str, Spoil], ...]
    read: Callable[[Path], object]
    cost: float


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _contours(root: Path, count: int = 3) -> None:
    made = generate_batch(PathfinderConfig.preset("mini"), split="train", seed=0, start=0, count=count)
    for kind, images in (("imgs", made.images), ("seg", made.masks.astype(np.uint8) * 255)):
        for k in range(count):
            path = root / kind / "1" / f"sample_{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[k]).save(path)


def _metadata(root: Path) -> None:
    _contours(root)
    (root / "metadata").mkdir()
    np.save(root / "metadata" / "1.npy", np.array([["imgs/1", "seg/1", f"sample_{k}.png", str(k)] for k in range(3)]))


def _arena(root: Path) -> None:
    _contours(root)
    (root / "metadata").mkdir()
    np.save(root / "metadata" / "1.npy", np.array([["imgs/1", f"sample_{k}.png", str(k), "1"] for k in range(3)]))


def _listed(root: Path) -> None:
    _contours(root)
    _put(root / "list.txt", "".join(f"imgs/1/sample_{k}.png {k % 2}\n" for k in range(3)).encode())


def _read_folder(root: Path) -> None:
    data = FolderPathfinder(root, check="full")
    for k in range(len(data)):
        data[k]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        skipping = FolderPathfinder(root, on_error="skip", check="full")
    torch.utils.data.default_collate([skipping[k] for k in range(len(skipping))])


_CATEGORIES = [
    {"id": 7, "name": "cat", "isthing": 1, "color": [200, 10, 10]},
    {"id": 90, "name": "sky", "isthing": 0},
    {"id": 3, "name": "dog", "isthing": 1},
]


def _coco(root: Path) -> None:
    ids = np.array([[70000, 70000, 90, 90], [70000, 5, 5, 90], [300, 300, 0, 0]])
    segments = [
        {"id": 70000, "category_id": 7, "iscrowd": 0, "area": 3, "bbox": [0, 0, 2, 2]},
        {"id": 90, "category_id": 90, "iscrowd": 0, "area": 3, "bbox": [2, 0, 2, 2]},
        {"id": 5, "category_id": 7, "iscrowd": 0, "area": 2, "bbox": [1, 1, 2, 1]},
        {"id": 300, "category_id": 3, "iscrowd": 1, "area": 2, "bbox": [0, 2, 2, 1]},
    ]
    content = {
        "images": [{"id": k, "file_name": f"{k}.png", "height": 3, "width": 4} for k in (11, 12)],
        "annotations": [{"image_id": k, "file_name": f"{k}.png", "segments_info": segments} for k in (11, 12)],
        "categories": _CATEGORIES,
    }
    for k in (11, 12):
        for folder, pixels in (("images", ids % 251), ("panoptic", ids), ("predicted", ids)):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(rgb_from_ids(pixels)).save(root / folder / f"{k}.png")
    instances = [{"id": 1, "image_id": 11, "category_id": 7, "iscrowd": 0, "segmentation": [[0, 0, 1, 1, 0, 1]]}]
    _put(root / "panoptic.json", json.dumps(content).encode())
    _put(root / "predicted.json", json.dumps(content).encode())
    _put(root / "instances.json", json.dumps({**content, "annotations": instances}).encode())
    _put(root / "categories.json", json.dumps(_CATEGORIES).encode())


def _read_coco(root: Path) -> None:
    check(root / "images", root / "panoptic.json", workers=1)
    for given in (None, root / "instances.json"):
        data = CocoPanoptic(root / "images", root / "panoptic.json", instances=given, filter_empty=given is not None)
        for k in range(len(data)):
            data[k]


def _pictures(root: Path) -> None:
    random = np.random.default_rng(0)
    for suffix in ("bmp", "jpg", "png", "tiff", "webp"):
        pixels = random.integers(0, 255, (9, 7, 3), np.uint8)
        image = Image.fromarray(pixels)
        exif = image.getexif()
        exif[0x0112] = 6
        (root / "seen").mkdir(exist_ok=True)
        image.save(root / "seen" / f"{suffix}.{suffix}", exif=exif)


def _read_pictures(root: Path) -> None:
    data = Pictures(root / "seen", Resize(shortest=8, longest=16))
    for k in range(len(data)):
        with contextlib.suppress(crbp.data.panoptic.DataError):
            data[k]


def _arrays() -> dict[str, Any]:
    return {
        "model": {"a.weight": np.ones((2, 3), np.float32), "b": np.zeros(2)},
        "__author__": "x",
        "matching_heuristics": True,
    }


def _pickled(root: Path) -> None:
    _put(root / "a.pkl", pickle.dumps(_arrays(), 2))


def _torch_file(root: Path) -> None:
    torch.save({"model": {"a.weight": torch.ones(2, 3), "b": torch.zeros(2)}, "iteration": 3}, root / "a.pth")


_NET = {
    "class_path": "crbp.models.PathfinderNet",
    "init_args": {
        "cell": {"class_path": "crbp.cells.HGRU", "init_args": {"channels": 2, "kernel_size": 3, "horizon": 3}},
        "evolve": {
            "steps": 3,
            "gradient": {
                "class_path": "crbp.RBP",
                "init_args": {"solver": {"class_path": "crbp.Neumann", "init_args": {"terms": 3}}},
            },
        },
    },
}
_CONFIG = {
    "seed_everything": 0,
    "trainer": {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "accelerator": "cpu",
    },
    "model": {
        "class_path": "crbp.tasks.ContourTask",
        "init_args": {
            "net": _NET,
            "penalty": {"class_path": "crbp.tasks.LipschitzPenalty", "init_args": {"weight": 1.0, "bound": 0.9}},
            "learning_rate": 0.01,
        },
    },
    "data": {
        "class_path": "crbp.tasks.ContourData",
        "init_args": {
            "source": {
                "class_path": "crbp.tasks.Generated",
                "init_args": {"preset": "mini", "settings": {"contour_length": 4}},
            },
            **{"batch_size": 2, "train_size": 2, "val_size": 2, "test_size": 2, "workers": 0, "flips": True},
        },
    },
}


def _net() -> PathfinderNet:
    cell = crbp.cells.HGRU(channels=2, kernel_size=3, horizon=3)
    return PathfinderNet(cell, crbp.Evolve(steps=3, gradient=crbp.RBP(crbp.Neumann(terms=3))))


def _weights(root: Path) -> None:
    save_net(_net().state_dict(), root / "a.safetensors", Origin(net=_NET, run=_CONFIG, name="a"))


def _handed_on(root: Path) -> None:
    _weights(root)
    hub.save_pretrained(root / "a.safetensors", root / "net")


def _beside_weights(root: Path) -> None:
    checkpoint = root / "run" / "weights" / "best.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    _put(root / "run" / "table.csv", b"row,seed,F1 at N\nbest,0,.98\nlast,0,.97\n")
    _put(root / "run" / "made.json", json.dumps({"seed": 0, "seconds": 1.5, "commit": "abc"}).encode())
    analysis = {"checkpoint": str(checkpoint), "images": 4, "f1": 0.98, "curve": [0.1, 0.2]}
    _put(root / "run" / "analysis" / "analysis.json", json.dumps(analysis).encode())
    with SummaryWriter(str(root / "events")) as log:
        for step in range(3):
            log.add_scalar("val/f1", step / 4, step)
    (made,) = (root / "events").iterdir()
    made.rename(root / "run" / "events.out.tfevents.0")


def _read_card(root: Path) -> str:
    checkpoint = root / "run" / "weights" / "best.safetensors"
    return written_card(checkpoint, _net(), Origin(net=_NET, run=_CONFIG), numbers={}, licence="mit")


def _run(root: Path) -> None:
    _config(root)
    trainer = pl.Trainer(
        **{**_CONFIG["trainer"], "enable_model_summary": False, "max_steps": 0, "inference_mode": False}  # type: ignore[dict-item]
    )
    task = ContourTask(_net(), penalty=LipschitzPenalty(weight=1.0))
    trainer.strategy.connect(task)
    trainer.strategy._lightning_module = task
    task.trainer = trainer
    (root / "run" / "checkpoints").mkdir(parents=True)
    (root / "run" / "config.yaml").write_bytes((root / "a.yaml").read_bytes())
    trainer.save_checkpoint(root / "run" / "checkpoints" / "last.ckpt")


def _config(root: Path) -> None:
    _put(root / "a.yaml", yaml.safe_dump(_CONFIG).encode())


def _dataset(root: Path) -> None:
    config = PathfinderConfig.preset("mini")
    write(config, root / "set", split="train", size=4, seed=0, batch_size=2, workers=1, progress=False)


def _spoil_torch(random: Random, data: bytes) -> bytes:
    if random.random() < 0.4:
        return bad.spoil_zip(random, data)
    tree = torch.load(io.BytesIO(data), weights_only=True)
    values = (*bad.VALUES, bad.Malicious(CANARY, random.randrange(3)), torch.zeros(3), torch.zeros(1).expand(10**12))
    made = io.BytesIO()
    torch.save(bad.spoil_tree(random, tree, values), made, _use_new_zipfile_serialization=random.random() < 0.8)
    return made.getvalue()


def _spoil_yaml(random: Random, data: bytes) -> bytes:
    text = yaml.dump(bad.spoil_tree(random, yaml.safe_load(data)), allow_unicode=True)
    tags = ("!!python/object/apply:os.mkdir [canary]", "&a [*a, *a]", "!!int x", "*nowhere", "2026-99-99")
    if random.random() < 0.1:
        text = text.replace(": 2\n", f": {random.choice(tags)}\n", 1)
    return text.replace(bad.DEEP, "[" * 300 + "]" * 300).encode("utf-8", "surrogatepass")


class _NoTraining(_CommandLine):
    """Everything that `crbp fit` does with its configuration before it trains."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _read_config(root: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        _NoTraining(args=["fit", "--config", str(root / "a.yaml")])


def _spoil_pickle(random: Random, data: bytes) -> bytes:
    return bad.spoil_pickle(random, data, CANARY)


def _evaluate(root: Path) -> None:
    evaluate_panoptic_files(root / "panoptic.json", None, root / "predicted.json", None, workers=1)


_CKPT = "run/checkpoints/last.ckpt"
READERS = {
    "contour_png": Reader(
        _metadata, (("imgs/1/sample_1.png", bad.spoil_png), ("seg/1/sample_0.png", bad.spoil_png)), _read_folder, 24
    ),
    "metadata_npy": Reader(_metadata, (("metadata/1.npy", bad.spoil_npy),), _read_folder, 10),
    "arena_npy": Reader(_arena, (("metadata/1.npy", bad.spoil_npy),), _read_folder, 10),
    "list": Reader(_listed, (("list.txt", bad.spoil_lines),), _read_folder, 8),
    "panoptic_json": Reader(
        _coco, (("panoptic.json", bad.spoil_json), ("instances.json", bad.spoil_json)), _read_coco, 35
    ),
    "panoptic_png": Reader(
        _coco, (("panoptic/11.png", bad.spoil_png), ("images/12.png", bad.spoil_png)), _read_coco, 35
    ),
    "categories": Reader(
        _coco, (("categories.json", bad.spoil_json),), lambda root: Categories.read(root / "categories.json"), 5
    ),
    "predictions": Reader(
        _coco,
        (("predicted.json", bad.spoil_json), ("panoptic.json", bad.spoil_json), ("predicted/11.png", bad.spoil_png)),
        _evaluate,
        15,
    ),
    "pictures": Reader(
        _pictures,
        (
            ("seen/png.png", bad.spoil_png),
            *((f"seen/{k}.{k}", bad.spoil_bytes) for k in ("bmp", "jpg", "tiff", "webp")),
        ),
        _read_pictures,
        14,
    ),
    "pickle": Reader(_pickled, (("a.pkl", _spoil_pickle),), lambda root: tensors(read_checkpoint(root / "a.pkl")), 3),
    "torch_file": Reader(
        _torch_file, (("a.pth", _spoil_torch),), lambda root: tensors(read_checkpoint(root / "a.pth")), 20
    ),
    "safetensors": Reader(
        _weights, (("a.safetensors", bad.spoil_safetensors),), lambda root: load_net(root / "a.safetensors"), 80
    ),
    "handed_on": Reader(
        _handed_on,
        (("net/config.json", bad.spoil_json), ("net/model.safetensors", bad.spoil_safetensors)),
        lambda root: hub.from_pretrained(root / "net"),
        80,
    ),
    "card": Reader(
        _beside_weights,
        (
            *((f"run/{name}.json", bad.spoil_json) for name in ("made", "analysis/analysis")),
            *((f"run/{name}", bad.spoil_bytes) for name in ("table.csv", "events.out.tfevents.0")),
        ),
        _read_card,
        20,
    ),
    "checkpoint": Reader(
        _run, ((_CKPT, _spoil_torch), ("run/config.yaml", _spoil_yaml)), lambda root: load_trained(root / _CKPT), 150
    ),
    "config": Reader(_config, (("a.yaml", _spoil_yaml),), _read_config, 300),
    "manifest": Reader(
        _dataset,
        (("set/manifest.json", bad.spoil_json), ("set/checksums/000001.sha256", bad.spoil_lines)),
        lambda root: verify(root / "set"),
        8,
    ),
}
