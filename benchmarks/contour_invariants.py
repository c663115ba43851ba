"""Look at many generated contour images, of the presets and of settings drawn at random, for what must always hold.

    PYTHONPATH=src python benchmarks/contour_invariants.py --images 10000 --json results/reliability/contours.json

Of each scene: dashes follow each other within a contour, no two strokes touch, discs sit on ends. Of each image: its
mask is one piece once the gaps between dashes are closed, and covers the disc. Of each task: image i is the same
whether made alone, in a batch, in another order or in another process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from scipy.ndimage import distance_transform_edt, label

from crbp.data.pathfinder import PRESETS, GenerationError, PathfinderConfig, generate_batch, scene
from crbp.data.pathfinder.generator import generate


def drawn(random: Random) -> PathfinderConfig:
    """A preset, or one with some of its settings drawn at random."""
    name = random.choice(sorted(PRESETS))
    if random.random() < 0.3:
        return PathfinderConfig.preset(name)
    preset = PathfinderConfig.preset(name)
    return PathfinderConfig.preset(
        name,
        contour_length=random.randint(2, preset.contour_length),
        n_distractors=random.randint(0, preset.n_distractors),
        n_contours=random.randint(1, 2),
        continuity=random.uniform(1.5, 4.0),
        contrast=random.uniform(0.5, 1.0),
        anti_alias=random.randint(1, 3),
    )


def distances(dashes: np.ndarray) -> np.ndarray:
    """Least distance between all pairs of segments (n, 4) of x0, y0, x1, y1; 0 where two cross."""
    start, end = dashes[:, :2], dashes[:, 2:]
    edge = (end - start)[:, None]

    def side(points: np.ndarray) -> np.ndarray:
        away = points[None] - start[:, None]
        return edge[..., 0] * away[..., 1] - edge[..., 1] * away[..., 0]

    def to_points(points: np.ndarray) -> np.ndarray:
        away = points[None] - start[:, None]
        share = np.clip((away * edge).sum(-1) / (edge * edge).sum(-1), 0, 1)
        return np.linalg.norm(away - share[..., None] * edge, axis=-1)

    apart, cross = np.minimum(to_points(start), to_points(end)), side(start) * side(end) < 0
    return np.where(cross & cross.T, 0.0, np.minimum(apart, apart.T))


def scene_faults(config: PathfinderConfig, index: int, *, seed: int) -> list[str]:
    """What is wrong with the geometry of one image."""
    made = scene(config, index, split="train", seed=seed)
    apart = distances(np.concatenate(made.contours))
    owner = np.repeat(np.arange(len(made.contours)), [len(contour) for contour in made.contours])
    i, j = np.triu_indices(len(owner), k=1)
    follows, apart = (owner[i] == owner[j]) & (j == i + 1), apart[i, j]
    faults = []
    if (wrong := follows & ~((apart > 0) & (apart <= 2 * config.dash_margin + 1e-6))).any():
        faults.append(f"dashes {i[wrong][0]} and {j[wrong][0]} do not follow each other")
    if (wrong := ~follows & (apart <= config.dash_thickness)).any():
        faults.append(f"strokes {i[wrong][0]} and {j[wrong][0]} touch")
    target = made.contours[made.target]
    if not any(np.array_equal(made.discs[0], end) for end in (target[0, :2], target[-1, 2:])):
        faults.append("the disc is on no end of the target")
    return faults


def image_faults(config: PathfinderConfig, index: int, *, seed: int) -> list[str]:
    """What is wrong with the pixels of one image."""
    made = generate_batch(config, split="train", seed=seed, start=index, count=1)
    mask, scale = made.masks[0], config.image_size / config.window
    laid = scene(config, index, split="train", seed=seed)
    faults = []
    closed = distance_transform_edt(~mask) <= config.dash_margin * scale + 1.5
    if label(closed, np.ones((3, 3)))[1] != 1:
        faults.append("the mask is in several pieces")
    column, row = (int(value * scale) for value in laid.discs[0])
    if not mask[row, column]:
        faults.append("the mask does not cover the disc")
    if (made.images[0][mask] == 0).any():
        faults.append("the mask covers what is not drawn")
    return faults


def digests(config: PathfinderConfig, indices: list[int], seed: int) -> dict[int, str]:
    """A digest of image, mask and label of each index, made in the order given."""
    made = generate(config, np.array(indices, np.int64), split="train", seed=seed)
    rows = zip(indices, made.images, made.masks, made.labels, strict=True)
    return {
        index: hashlib.blake2b(image.tobytes() + mask.tobytes() + bytes([int(kind)]), digest_size=8).hexdigest()
        for index, image, mask, kind in rows
    }


def order_faults(
    config: PathfinderConfig, first: int, count: int, random: Random, pool: Any, *, seed: int
) -> list[str]:
    """The images that depend on what they are made with."""
    indices = list(range(first, first + count))
    whole = digests(config, indices, seed)
    shuffled = random.sample(indices, count)
    cut = random.randint(1, count - 1)
    parts = [shuffled[:cut], shuffled[cut:]]
    others: dict[int, str] = {}
    for done in [pool.submit(digests, config, part, seed) for part in parts] if pool else []:
        others |= done.result()
    others = others or digests(config, shuffled[:cut], seed) | digests(config, shuffled[cut:], seed)
    return [f"image {index} depends on how it is made" for index in indices if whole[index] != others[index]]


def look_at(random: Random, count: int, pool: Any = None) -> tuple[int, list[str]]:
    """The number of images looked at of a task drawn at random, and what is wrong with them."""
    config, seed, first = drawn(random), random.randrange(2**32), random.randrange(2**40)
    try:
        faults = order_faults(config, first, count, random, pool, seed=seed)
        for index in range(first, first + count):
            found = scene_faults(config, index, seed=seed) + image_faults(config, index, seed=seed)
            faults += [f"{config}, seed {seed}, image {index}: {each}" for each in found]
    except GenerationError:  # too crowded, which it says
        return 0, []
    return count, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    random, start = Random(options.seed), time.monotonic()
    images, tasks, crowded, faults = 0, 0, 0, []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        while images < options.images:
            seen, wrong = look_at(random, 50, pool)
            images, tasks, crowded, faults = images + seen, tasks + 1, crowded + (not seen), faults + wrong
    found = {"images": images, "tasks": tasks, "too_crowded": crowded, "faults": len(faults), "first": faults[:5]}
    print(json.dumps({**found, "seconds": round(time.monotonic() - start)}, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**found, "seed": options.seed}, indent=1) + "\n")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
