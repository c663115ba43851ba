"""Files of a written data set: each whole or not there, listed by its checksum, claimed by a manifest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from crbp._files import write_whole
from crbp.data._foreign import leads_out, read_json
from crbp.data._parallel import bar, cores, run
from crbp.data.errors import DataError


class Batch(Protocol):
    """Some images to write below a folder."""

    @property
    def out(self) -> Path:
        """The folder of the data set."""

    @property
    def images(self) -> int:
        """How many they are."""


BatchT = TypeVar("BatchT", bound=Batch)


class Written(NamedTuple):
    """What a call of a writer did: images made, images found whole from before, and the manifest's path."""

    made: int
    kept: int
    manifest: Path


def write_atomic(path: Path, content: bytes) -> str:
    """Write a file that is whole or not there; return the SHA-256 of its content.

    The temporary name starts with a dot and ends in the process number, so that no reader takes it for an
    image and no two writers share it.

    Raises:
        StorageError: It cannot be written.
    """
    # Checksums tell a file that a power cut took, so that none need be waited for.
    write_whole(path, content, part=f".{path.name}.{os.getpid()}.tmp", sync=False)
    return hashlib.sha256(content).hexdigest()


def write_missing(
    jobs: Sequence[BatchT],
    work: Callable[[BatchT], int],
    checksums: Callable[[BatchT], Path],
    *,
    what: str,
    workers: int | None,
    progress: bool,
) -> int:
    """Write the batches that are not there whole yet, in parallel; the number of images made.

    Args:
        jobs: all batches.
        work: writes one and returns its number of images; a function of a module.
        checksums: the file that lists those of a batch, and is written last.
        what: shown beside the bar.
        workers: processes; None for the cores at hand.
        progress: whether to show a bar.
    """
    with bar(progress, what, sum(job.images for job in jobs)) as advance:
        todo = []
        for job in jobs:
            if checksums(job).exists() and not faults(job.out, checksums(job)):
                advance(job.images)
            else:
                todo.append(job)
        for made in run(work, todo, cores() if workers is None else workers):
            advance(made)
    return sum(job.images for job in todo)


def write_checksums(path: Path, sums: dict[str, str]) -> None:
    """Write digests by file name as `sha256sum -c` reads them."""
    write_atomic(path, "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode())


def faults(out: Path, checksums: Path) -> list[str]:
    """Return the files listed in `checksums` that are missing or changed, each with what is wrong."""
    found = []
    for line in checksums.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if leads_out(name):
            found.append(f"{name!r}, which {checksums.name} lists, leads out of the folder")
            continue
        try:
            content = (out / name).read_bytes()
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
            continue
        if hashlib.sha256(content).hexdigest() != digest:
            found.append(f"{name} has changed since it was written")
    return found


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_manifest(path: Path, content: dict[str, Any]) -> None:
    """Write a manifest as JSON."""
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def load_manifest(path: Path, *, key: str) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        DataError: It is not JSON or lacks `key`, by which such a manifest is known.
    """
    content = read_json(path, "delete it and write again")
    if not isinstance(content, dict) or key not in content:
        raise DataError(path, f"this is not a manifest with {key!r}", "choose another folder")
    return content


def check_claim(path: Path, found: dict[str, Any], task: dict[str, Any]) -> None:
    """Raise `DataError` where the manifest `found` in the file `path` is of another data set than `task`."""
    other = sorted(name for name, value in task.items() if found.get(name) != value)
    if other:
        raise DataError(path, f"the folder holds a data set of other {', '.join(other)}", "choose another folder")
