"""The torch data set: samples, indexing, workers and caches all give the one image that the config fixes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import crbp.data
from crbp.data.pathfinder import Pathfinder, PathfinderConfig, _store, generate_batch


def _same(a, b):
    return torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"]) and a["label"] == b["label"]


def test_a_sample_has_the_promised_form():
    data = crbp.data.pathfinder.Pathfinder(contour_length=6, image_size=75, split="val", size=10, seed=2)
    sample = data[3]
    assert sample["image"].dtype == torch.float32
    assert sample["image"].shape == (1, 75, 75)
    assert sample["mask"].dtype == torch.bool
    assert sample["mask"].shape == (75, 75)
    assert type(sample["label"]) is int
    assert 0 <= sample["image"].min() < sample["image"].max() <= 1
    made = generate_batch(data.config, split="val", seed=2, start=3, count=1)
    np.testing.assert_array_equal(sample["image"][0].mul(255).round().numpy(), made.images[0])


def test_the_default_is_the_published_task():
    data = Pathfinder()
    assert len(data) == 200_000
    assert data.config == PathfinderConfig(contour_length=14, image_size=150)


def test_indices_count_from_both_ends_and_stop():
    data = Pathfinder(preset="mini", size=5)
    assert _same(data[-1], data[4])
    assert len(list(data)) == 5
    for index in (5, -6):
        with pytest.raises(IndexError, match="out of range for 5 images"):
            data[index]


def test_size_and_order_leave_images_alone():
    small, large = Pathfinder(preset="mini", size=4), Pathfinder(preset="mini", size=50)
    together = large.__getitems__([3, 0, 3, 49])
    assert _same(together[0], small[3])
    assert _same(together[1], small[0])
    assert _same(together[2], small[3])


def test_a_preset_takes_the_two_main_settings():
    assert Pathfinder(9, 64, preset="mini64").config == PathfinderConfig.preset("mini64", contour_length=9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"config": PathfinderConfig(), "contour_length": 9}, "contour_length cannot be given beside config"),
        ({"config": PathfinderConfig(), "preset": "mini"}, "preset cannot be given beside config"),
        ({"size": 0}, "size=0"),
        ({"split": "dev"}, "split='dev'"),
        ({"cache": "disk"}, "cache='disk' is unknown"),
        ({"cache": "memory", "cache_dir": "x"}, "exclude each other"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Pathfinder(**arguments)


def test_secondary_arguments_are_keyword_only():
    with pytest.raises(TypeError):
        Pathfinder(14, 150, "train", 10, 0, "mini")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the loader's own choice of start method
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_pickles_change_nothing(workers):
    data = pickle.loads(pickle.dumps(Pathfinder(preset="mini", size=24)))
    loader = DataLoader(data, batch_size=5, num_workers=workers)
    images = torch.cat([batch["image"] for batch in loader])
    made = generate_batch(data.config, split="train", seed=0, start=0, count=24)
    np.testing.assert_array_equal(images[:, 0].mul(255).round().numpy(), made.images)


def test_memory_keeps_images_and_pickles_without_them():
    data = Pathfinder(preset="mini", size=6, cache="memory")
    first = data[2]
    assert len(pickle.loads(pickle.dumps(data))._kept) == 0
    first["image"].zero_()  # a caller's edit must not reach what is kept
    again = data[2]
    assert _same(again, Pathfinder(preset="mini", size=6)[2])


def test_disk_cache_gives_the_same_images_from_whole_files(tmp_path, monkeypatch):
    monkeypatch.setattr(_store, "BLOCK", 16)
    plain = Pathfinder(preset="mini", size=40)
    cached = Pathfinder(preset="mini", size=40, cache_dir=tmp_path)
    assert all(_same(plain[i], cached[i]) for i in range(40))
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"{plain.config.digest}-train-0"
    files = sorted(folder.iterdir())
    assert [f.name for f in files if "labels" not in f.name] == [
        "000000000-000000016.npy",
        "000000016-000000032.npy",
        "000000032-000000040.npy",
    ]
    assert np.load(folder / "000000000-000000016.npy", mmap_mode="r").shape == (16, 2, 32, 32)


def test_disk_cache_is_reused_repaired_and_keyed(tmp_path, monkeypatch):
    monkeypatch.setattr(_store, "BLOCK", 16)
    Pathfinder(preset="mini", size=32, cache_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    times = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    (folder / "000000016-000000032.npy").unlink()
    # A file as a killed process leaves it: not under a block's name, so never read.
    (folder / "tmpabc.tmp").write_bytes(b"half")
    again = Pathfinder(preset="mini", size=32, cache_dir=tmp_path)
    assert (folder / "000000000-000000016.npy").stat().st_mtime_ns == times["000000000-000000016.npy"]
    assert _same(again[20], Pathfinder(preset="mini", size=32)[20])
    Pathfinder(preset="mini", size=4, seed=1, cache_dir=tmp_path)
    Pathfinder(preset="mini", size=4, split="val", cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_disk_cache_survives_many_writers(tmp_path, monkeypatch):
    monkeypatch.setattr(_store, "BLOCK", 8)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: Pathfinder(preset="mini", size=32, cache_dir=tmp_path), range(4)))
    plain = Pathfinder(preset="mini", size=32)
    assert all(_same(data[i], plain[i]) for data in made for i in (0, 9, 31))
    assert not list(tmp_path.rglob("*.tmp"))


def test_disk_cache_refuses_a_disk_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(_store.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"GiB free; choose another cache_dir"):
        Pathfinder(preset="mini", size=32, cache_dir=tmp_path)


def test_importing_stays_light_and_a_missing_extra_is_named():
    code = """
import sys, crbp, crbp.data
heavy = {"numba", "PIL", "pyarrow", "rich"} & set(sys.modules)
assert not heavy, heavy
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
try:
    crbp.data.pathfinder
except ImportError as error:
    assert "numba" in str(error) and "pip install 'crbp[data]'" in str(error), error
else:
    raise SystemExit("no error without numba")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
