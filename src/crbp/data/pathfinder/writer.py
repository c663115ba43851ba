"""Data sets on disk: written in parallel, resumed after a kill, divided among machines, and verified."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from crbp.data._extras import require

require("PIL", "pyarrow")

from crbp.data._files import (  # noqa: E402
    Written,
    check_claim,
    faults,
    load_manifest,
    save_manifest,
    sha256,
    write_missing,
)
from crbp.data._foreign import leads_out  # noqa: E402
from crbp.data.errors import DataError  # noqa: E402
from crbp.data.pathfinder._formats import Job, checksum_path, write_batch  # noqa: E402
from crbp.data.pathfinder.config import STREAM_VERSION, PathfinderConfig, Split, stream_key  # noqa: E402


def write(
    config: PathfinderConfig,
    out: str | Path,
    *,
    split: Split,
    size: int,
    seed: int,
    format: Literal["folder", "parquet"] = "folder",
    shard: tuple[int, int] = (0, 1),
    batch_size: int = 1000,
    workers: int | None = None,
    progress: bool = True,
) -> Written:
    """Write the images 0 … `size` − 1 of a split under `out`, so that they survive a kill and can be verified.

    `"folder"` makes `curv_contour_length_L/{imgs,seg,metadata}` as the published sets have it, which
    `FolderPathfinder` reads; `"parquet"` makes `data/<split>-*.parquet`, which `datasets.load_dataset`
    reads with images decoded. Both get `checksums/*.sha256`, as `sha256sum -c` takes them, and a manifest.

    Batches found whole are verified and kept, so a call that was killed is simply repeated. The call
    starts `workers` processes afresh ("spawn"): in a script, keep it under `if __name__ == "__main__":`.

    Args:
        config: The task.
        out: The folder; one per split.
        split: `"train"`, `"val"` or `"test"`.
        size: Images of the whole set, over all shards.
        seed: Seed of the set.
        format: `"folder"` or `"parquet"`.
        shard: (i, n): write the i-th of n parts, i from 0; the parts are disjoint and make the whole.
        batch_size: Images a metadata file, checksum file or Parquet file.
        workers: Processes; the cores at hand by default; 1 works in this process.
        progress: Whether to show a bar on standard error.

    Raises:
        ValueError: An argument is out of range.
        DataError: `out` holds another data set.
        GenerationError: A picture is too crowded for its settings.
    """
    _check(config, split=split, size=size, seed=seed, format=format, shard=shard, batch_size=batch_size)
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be 1 or more")
    task = {
        "config": config.to_dict(),
        "config_digest": config.digest,
        "stream_version": STREAM_VERSION,
        "split": split,
        "seed": seed,
        "size": size,
        "format": format,
        "batch_size": batch_size,
        "shards": shard[1],
    }
    manifest = Path(out) / _manifest_name(shard)
    _claim(manifest, task, shard)
    batches = -(-size // batch_size)
    jobs = [
        Job(Path(out), config, split, seed, format, k, batches, k * batch_size, min(batch_size, size - k * batch_size))
        for k in range(shard[0], batches, shard[1])
    ]
    images = sum(job.images for job in jobs)
    made = write_missing(
        jobs, write_batch, checksum_path, what=f"writing {split} images", workers=workers, progress=progress
    )
    _save_manifest(manifest, task, shard, jobs)
    return Written(made, images - made, manifest)


def verify(out: str | Path) -> int:
    """Check every file of a written data set against its checksum; return the number of images.

    Raises:
        DataError: There is no manifest, a shard is missing or unfinished, or files are missing or changed;
            names the first few, and `write` with the same arguments makes them again.
    """
    root = Path(out)
    manifests = {path.name: load_manifest(path, key="shards") for path in sorted(root.glob("manifest*.json"))}
    if not manifests:
        raise DataError(root, "there is no manifest*.json", "give the folder that was written to")
    again = "write with the same arguments makes again what is missing"
    for name, manifest in manifests.items():
        _check_manifest(root / name, manifest)
    shards = next(iter(manifests.values()))["shards"]
    for k in range(shards):
        name = _manifest_name((k, shards))
        if not manifests.get(name, {}).get("complete"):
            raise DataError(root / name, f"shard {k} of {shards} is missing or unfinished", again)
    wrong: list[str] = []
    for manifest in manifests.values():
        for name, batch in manifest["batches"].items():
            path = root / name
            if not path.is_file() or sha256(path) != batch["sha256"]:
                wrong.append(f"{name} is missing or changed")
            else:
                wrong += faults(root, path)
    if wrong:
        raise DataError(root, f"{len(wrong)} files are wrong: {'; '.join(wrong[:5])}", again)
    return sum(int(batch["images"]) for m in manifests.values() for batch in m["batches"].values())


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Raise `DataError` unless a manifest is one that `write` makes."""
    shards, batches = manifest["shards"], manifest.get("batches")
    whole = isinstance(shards, int) and shards > 0 and isinstance(batches, dict)
    for name, batch in batches.items() if isinstance(batches, dict) else ():
        known = (
            isinstance(batch, dict) and isinstance(batch.get("sha256"), str) and isinstance(batch.get("images"), int)
        )
        whole = whole and known and not leads_out(name)
    if not whole:
        raise DataError(path, "this is not a manifest that was written here", "delete it and write again")


def _check(
    config: PathfinderConfig,
    *,
    split: Split,
    size: int,
    seed: int,
    format: str,
    shard: tuple[int, int],
    batch_size: int,
) -> None:
    stream_key(config, split=split, seed=seed)
    if format not in ("folder", "parquet"):
        raise ValueError(f"format={format!r} is unknown; use 'folder' or 'parquet'")
    if size < 1 or batch_size < 1:
        raise ValueError(f"size={size} and batch_size={batch_size} must be 1 or more")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard={shard} is not (i, n) with i from 0 to n - 1")


def _manifest_name(shard: tuple[int, int]) -> str:
    return "manifest.json" if shard[1] == 1 else f"manifest-{shard[0]:05d}-of-{shard[1]:05d}.json"


def _claim(manifest: Path, task: dict[str, Any], shard: tuple[int, int]) -> None:
    """Refuse a folder with another data set in it; else leave an unfinished manifest for others to see."""
    for path in sorted(manifest.parent.glob("manifest*.json")):
        check_claim(path, load_manifest(path, key="shards"), task)
    if not manifest.exists():
        save_manifest(manifest, {**task, "shard": shard[0], "complete": False, "batches": {}})


def _save_manifest(manifest: Path, task: dict[str, Any], shard: tuple[int, int], jobs: list[Job]) -> None:
    batches = {
        checksum_path(job).relative_to(job.out).as_posix(): {
            "start": job.start,
            "images": job.images,
            "sha256": sha256(checksum_path(job)),
        }
        for job in jobs
    }
    save_manifest(
        manifest,
        {
            **task,
            "shard": shard[0],
            "complete": True,
            "images": sum(job.images for job in jobs),
            "crbp_version": version("crbp"),
            "batches": batches,
        },
    )
