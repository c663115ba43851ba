"""What is written is what is generated, survives a kill, divides among shards, and can be verified."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from crbp.data.pathfinder import DataError, FolderPathfinder, PathfinderConfig, generate_batch, verify, write

MINI = PathfinderConfig.preset("mini")
HOME = "curv_contour_length_5"


def _write(out, size=20, config=MINI, **options):
    settings = {"split": "train", "seed": 0, "batch_size": 8, "workers": 1, "progress": False, **options}
    return write(config, out, size=size, **settings)


def _expected(size=20, config=MINI, split="train"):
    return generate_batch(config, split=split, seed=0, start=0, count=size)


def _files(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("form", ["segmentation", "classification"])
def test_a_written_folder_reads_back_as_generated(tmp_path, form):
    config = PathfinderConfig.preset("mini", form=form)
    done = _write(tmp_path, config=config)
    assert (done.made, done.kept) == (20, 0)
    data = FolderPathfinder(tmp_path)
    assert data.layout == ("metadata" if form == "segmentation" else "lra")
    assert len(data) == 20
    want = _expected(config=config)
    for k in range(20):
        assert data.name(k) == f"{HOME}/imgs/{k // 8}/sample_{k}.png"
        np.testing.assert_array_equal(data[k]["image"][0].mul(255).round().numpy(), want.images[k])
        np.testing.assert_array_equal(data[k]["mask"].numpy(), want.masks[k])
        assert data[k]["label"] == want.labels[k]
    assert verify(tmp_path) == 20


def test_metadata_has_the_published_columns(tmp_path):
    _write(tmp_path)
    table = np.load(tmp_path / HOME / "metadata" / "1.npy", allow_pickle=False)
    assert table.dtype.kind == "U"
    assert table.shape == (8, 11)
    assert list(table[0]) == ["imgs/1", "seg/1", "sample_8.png", "8", "2.2", "5", "2", "2.0", "1.3", "0.5", "1"]


def test_the_manifest_says_what_was_made(tmp_path):
    done = _write(tmp_path)
    manifest = json.loads(done.manifest.read_text())
    assert PathfinderConfig(**manifest["config"]) == MINI
    assert manifest["config_digest"] == MINI.digest
    assert (manifest["split"], manifest["seed"], manifest["size"], manifest["images"]) == ("train", 0, 20, 20)
    assert [b["images"] for b in manifest["batches"].values()] == [8, 8, 4]
    assert manifest["complete"]
    subprocess.run(
        ["sha256sum", "--check", "--quiet", *manifest["batches"]], cwd=tmp_path, check=True, capture_output=True
    )


def test_parquet_reads_back_as_generated(tmp_path):
    _write(tmp_path, format="parquet", split="val")
    names = sorted(p.name for p in (tmp_path / "data").iterdir())
    assert names == [f"validation-{k:05d}-of-00003.parquet" for k in range(3)]
    rows = [row for name in names for row in pq.read_table(tmp_path / "data" / name).to_pylist()]
    want = _expected(split="val")
    assert [row["index"] for row in rows] == list(range(20))
    for k, row in enumerate(rows):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))), want.images[k])
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["mask"]["bytes"]))) > 0, want.masks[k])
        assert row["label"] == want.labels[k]
    assert verify(tmp_path) == 20


def test_hugging_face_datasets_decodes_the_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    _write(tmp_path / "set", size=10, format="parquet")
    datasets.disable_progress_bars()
    files = sorted(str(p) for p in (tmp_path / "set" / "data").iterdir())
    loaded = datasets.load_dataset(
        "parquet", data_files={"train": files}, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(loaded.features["image"], datasets.Image)
    np.testing.assert_array_equal(np.asarray(loaded[9]["image"]), _expected(10).images[9])


def test_processes_write_what_one_process_writes(tmp_path):
    _write(tmp_path / "one")
    _write(tmp_path / "two", workers=2)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")


def test_shards_are_disjoint_and_make_the_whole(tmp_path):
    _write(tmp_path / "whole", size=40)
    made = [_write(tmp_path / "parts", size=40, shard=(k, 3)).made for k in (2, 0, 1)]
    assert sum(made) == 40
    whole, parts = _files(tmp_path / "whole"), _files(tmp_path / "parts")
    manifests = {name: json.loads(parts.pop(name)) for name in list(parts) if name.startswith("manifest")}
    assert len(manifests) == 3
    names = [name for manifest in manifests.values() for name in manifest["batches"]]
    assert len(names) == len(set(names)) == 5
    whole.pop("manifest.json")
    assert parts == whole
    assert verify(tmp_path / "parts") == 40


def test_a_missing_shard_is_found(tmp_path):
    _write(tmp_path, size=40, shard=(0, 2))
    with pytest.raises(DataError, match="shard 1 of 2 is missing or unfinished"):
        verify(tmp_path)


def test_more_shards_than_batches_leaves_empty_ones(tmp_path):
    assert [_write(tmp_path, size=8, shard=(k, 2)).made for k in range(2)] == [8, 0]
    assert verify(tmp_path) == 8


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
def test_a_killed_run_leaves_whole_files_and_resumes(tmp_path):
    out = tmp_path / "killed"
    code = (
        "from crbp.data.pathfinder import PathfinderConfig, write\n"
        f"write(PathfinderConfig.preset('mini'), {str(out)!r}, split='train', size=100000, seed=0,"
        " batch_size=8, workers=1, progress=False)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 300
        while len(list(out.glob("checksums/*.sha256"))) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    # Every file under its final name is whole, whether its batch was finished or not.
    for path in out.rglob("sample_*.png"):
        if not path.name.startswith("."):
            Image.open(path).load()
    with pytest.raises(DataError, match="missing or unfinished"):
        verify(out)
    # The run resumes where it was, here shortened by naming its first batches alone in the manifest.
    manifest = json.loads((out / "manifest.json").read_text())
    assert not manifest["complete"]
    finished = 8 * len(list(out.glob("checksums/*.sha256")))
    size = finished + 12
    (out / "manifest.json").write_text(json.dumps({**manifest, "size": size}))
    times = {p: p.stat().st_mtime_ns for p in out.glob("checksums/*.sha256")}
    done = _write(out, size=size)
    assert (done.made, done.kept) == (12, finished)
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    assert verify(out) == size
    want = _expected(size)
    data = FolderPathfinder(out)
    for k in (0, finished - 1, finished, size - 1):
        np.testing.assert_array_equal(data[k]["image"][0].mul(255).round().numpy(), want.images[k])


def test_a_damaged_or_missing_file_is_found_and_made_again(tmp_path):
    _write(tmp_path)
    before = _files(tmp_path)
    damaged = tmp_path / HOME / "imgs" / "1" / "sample_9.png"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (tmp_path / HOME / "seg" / "2" / "sample_17.png").unlink()
    with pytest.raises(DataError, match=r"2 files are wrong: .*sample_9.png has changed.*sample_17.png cannot"):
        verify(tmp_path)
    done = _write(tmp_path)
    assert (done.made, done.kept) == (12, 8)
    assert _files(tmp_path) == before
    (tmp_path / "checksums" / "000000.sha256").write_text("")
    with pytest.raises(DataError, match=r"000000.sha256 is missing or changed"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "of other seed"),
        ({"split": "val"}, "of other split"),
        ({"size": 21}, "of other size"),
        ({"format": "parquet"}, "of other format"),
        ({"shard": (0, 2)}, "of other shards"),
        ({"config": PathfinderConfig.preset("mini", contour_length=6)}, "of other config, config_digest"),
    ],
)
def test_two_data_sets_cannot_share_a_folder(tmp_path, change, words):
    _write(tmp_path)
    before = _files(tmp_path)
    with pytest.raises(DataError, match=words):
        _write(tmp_path, **change)
    assert _files(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "zip"}, "format='zip' is unknown"),
        ({"shard": (2, 2)}, r"shard=\(2, 2\)"),
        ({"size": 0}, "size=0"),
        ({"workers": 0}, "workers=0"),
        ({"split": "dev"}, "split='dev'"),
    ],
)
def test_wrong_arguments_write_nothing(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        _write(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_verifying_what_was_never_written_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"there is no manifest\*.json"):
        verify(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        verify(tmp_path)
