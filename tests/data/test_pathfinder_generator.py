"""The generator keeps its promises: purity, disjoint splits, and scenes whose geometry is what the task says."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest

from crbp.data._compile import cached
from crbp.data.pathfinder import PRESETS, GenerationError, PathfinderConfig, generate_batch, scene

MINI = PathfinderConfig.preset("mini")


def _hashes(config: PathfinderConfig, split: str, count: int, seed: int = 0) -> list[str]:
    images = generate_batch(config, split=split, seed=seed, start=0, count=count).images
    return [hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in images]


def _distances(dashes: np.ndarray) -> np.ndarray:
    """Least distance between all pairs of segments (n, 4), shape (n, n); 0 where two cross."""
    u, v = dashes[:, :2], dashes[:, 2:]

    def side(points):  # of point j seen from segment i
        edge, away = (v - u)[:, None], points[None] - u[:, None]
        return edge[..., 0] * away[..., 1] - edge[..., 1] * away[..., 0]

    def to_segments(points):  # from point j to segment i
        edge, away = (v - u)[:, None], points[None] - u[:, None]
        t = np.clip((away * edge).sum(-1) / (edge * edge).sum(-1), 0, 1)
        return np.linalg.norm(away - t[..., None] * edge, axis=-1)

    apart = np.minimum(to_segments(u), to_segments(v))
    straddles = side(u) * side(v) < 0
    return np.where(straddles & straddles.T, 0.0, np.minimum(apart, apart.T))


def test_images_are_pinned_for_every_machine():
    # A change here changes every published number: raise STREAM_VERSION and say so in the change log.
    made = generate_batch(PathfinderConfig(), split="train", seed=0, start=0, count=8)
    digest = hashlib.sha256(made.images.tobytes() + made.masks.tobytes()).hexdigest()
    assert digest[:16] == "a539c37a73250ce6"


def test_an_image_does_not_depend_on_what_is_asked_with_it():
    whole = generate_batch(MINI, split="val", seed=3, start=0, count=40)
    for start, count in ((0, 1), (7, 5), (39, 1)):
        part = generate_batch(MINI, split="val", seed=3, start=start, count=count)
        for got, want in zip(part, whole, strict=True):
            np.testing.assert_array_equal(got, want[start : start + count])


def test_splits_and_seeds_share_no_image():
    count = 2000
    streams = [_hashes(MINI, split, count) for split in ("train", "val", "test")]
    streams.append(_hashes(MINI, "train", count, seed=1))
    assert len({digest for stream in streams for digest in stream}) == 4 * count


@pytest.mark.parametrize(
    "change",
    [
        {"contour_length": 8},
        {"continuity": 2.0},
        {"dash_thickness": 1.1},
        {"clearance": 1.7},
        {"n_distractors": 3},
        {"seed_distance": 4.0},
        {"image_size": 64},
        {"contrast": 0.5},
        {"anti_alias": 5},
        {"form": "classification"},
    ],
)
def test_every_setting_changes_the_images_and_the_digest(change):
    other = replace(MINI, **change)
    assert other.digest != MINI.digest
    first = generate_batch(MINI, split="train", seed=0, start=0, count=4).images
    second = generate_batch(other, split="train", seed=0, start=0, count=4).images
    assert first.shape != second.shape or not np.array_equal(first, second)


def test_the_mask_threshold_changes_masks_alone():
    low = generate_batch(MINI, split="train", seed=0, start=0, count=8)
    high = generate_batch(replace(MINI, mask_threshold=0.6), split="train", seed=0, start=0, count=8)
    np.testing.assert_array_equal(low.images, high.images)
    assert high.masks.sum() < low.masks.sum()
    assert not (high.masks & ~low.masks).any()


def test_a_scene_is_the_same_at_every_resolution():
    large = replace(PathfinderConfig(), image_size=300)
    for index in range(3):
        a = scene(PathfinderConfig(), index, split="train", seed=0)
        b = scene(large, index, split="train", seed=0)
        np.testing.assert_array_equal(np.concatenate(a.contours), np.concatenate(b.contours))
    # Both have 4x4 and 2x2 samples a pixel at the same places, so one is the block mean of the other.
    small = generate_batch(PathfinderConfig(), split="train", seed=0, start=0, count=3).images
    blocks = generate_batch(large, split="train", seed=0, start=0, count=3).images.astype(float)
    means = blocks.reshape(3, 150, 2, 150, 2).mean(axis=(2, 4))
    assert np.abs(means - small).max() <= 1.0


@pytest.mark.parametrize("name", ["pf14", "pf25", "mini", "mini64"])
def test_contours_are_chains_that_bend_gently_and_keep_their_distance(name):
    config = PathfinderConfig.preset(name)
    limit = np.cos(np.pi / 2 / config.continuity) - 1e-9
    # The occupancy map has cells of a third of the gap or less, so a gap may fall short by one diagonal.
    cell = 1 / max(1, np.ceil(3 / config.contour_gap))
    least = config.contour_gap + config.dash_thickness - np.sqrt(2) * cell
    for index in range(4):
        made = scene(config, index, split="train", seed=0)
        for contour in made.contours:
            assert np.allclose(np.linalg.norm(contour[:, 2:] - contour[:, :2], axis=1), config.dash_length)
            assert contour.min() >= config.padding
            assert contour.max() <= config.window - config.padding
            directions = (contour[:, 2:] - contour[:, :2]) / config.dash_length
            assert (np.sum(directions[1:] * directions[:-1], axis=1) >= limit).all()
            # Head plus margin along the old direction is the pivot, and tail minus margin along the new one.
            pivots = contour[:-1, 2:] + config.dash_margin * directions[:-1]
            np.testing.assert_allclose(pivots, contour[1:, :2] - config.dash_margin * directions[1:])
        distances = _distances(np.concatenate(made.contours))
        owner = np.repeat(np.arange(len(made.contours)), [len(c) for c in made.contours])
        i, j = np.triu_indices(len(owner), k=1)
        neighbours = (owner[i] == owner[j]) & (j == i + 1)
        assert (distances[i, j][neighbours] > config.dash_margin).all()
        assert (distances[i, j][~neighbours] > least).all()


def test_the_distance_of_segments_is_right():
    dashes = np.array([[0, 0, 2, 2], [0, 2, 2, 0], [3, 0, 5, 0], [3, 1, 5, 1]], dtype=float)
    distances = _distances(dashes)
    assert distances[0, 1] == 0
    assert distances[2, 3] == 1
    assert distances[1, 2] == 1


@pytest.mark.parametrize("form", ["segmentation", "classification"])
def test_discs_sit_on_the_ends_the_label_says(form):
    config = replace(MINI, form=form)
    labels = []
    for index in range(60):
        made = scene(config, index, split="train", seed=0)
        long = made.contours[: config.n_contours]
        ends = [{tuple(c[0, :2]), tuple(c[-1, 2:])} for c in long]
        owners = [next(k for k, pair in enumerate(ends) if tuple(disc) in pair) for disc in made.discs]
        assert owners[0] == made.target
        assert len({tuple(disc) for disc in made.discs}) == len(made.discs) == 1 + (form == "classification")
        assert made.label == int(len(owners) == 2 and owners[0] == owners[1])
        labels.append(made.label)
    assert set(labels) == ({0, 1} if form == "classification" else {0})


@pytest.mark.parametrize("name", ["pf14", "mini"])
def test_the_mask_is_the_target_and_nothing_else(name):
    config = PathfinderConfig.preset(name)
    made = generate_batch(config, split="test", seed=0, start=0, count=8)
    assert (made.images[made.masks] > 255 * config.mask_threshold).all()
    scale = config.window / config.image_size
    for index in range(8):
        laid = scene(config, index, split="test", seed=0)
        rows, columns = np.nonzero(made.masks[index])
        centres = scale * (np.stack([columns, rows], axis=1) + 0.5)
        target = laid.contours[laid.target]
        along = np.linspace(0, 1, 9)[:, None, None]
        points = (target[:, :2] + along * (target[:, 2:] - target[:, :2])).reshape(-1, 2)
        reach = config.dash_thickness / 2 + 1.5 * scale
        near = np.linalg.norm(centres[:, None] - points[None], axis=-1).min(axis=1) <= reach
        in_disc = np.linalg.norm(centres - laid.discs[0], axis=1) <= config.marker_radius + scale
        assert (near | in_disc).all()
        # Every dash of the target left a mark.
        middles = (target[:, :2] + target[:, 2:]) / 2
        assert (np.linalg.norm(middles[:, None] - centres[None], axis=-1).min(axis=1) <= reach).all()


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_generate_and_fill_the_tones(name):
    config = PathfinderConfig.preset(name)
    made = generate_batch(config, split="train", seed=0, start=0, count=4)
    assert made.images.shape == (4, config.image_size, config.image_size)
    assert made.images.max() == 255
    assert made.masks.any(axis=(1, 2)).all()
    samples = math.ceil(config.anti_alias * config.window / config.image_size) ** 2
    assert len(np.unique(made.images)) > samples / 2  # anti-aliased, not black and white


def test_marking_every_stroke_of_the_mini_task_is_far_from_solving_it():
    made = generate_batch(MINI, split="test", seed=0, start=0, count=500)
    strokes = made.images > 255 * MINI.mask_threshold
    hit = (strokes & made.masks).sum(axis=(1, 2))
    f1 = 2 * hit / (strokes.sum(axis=(1, 2)) + made.masks.sum(axis=(1, 2)))
    assert 0.5 < f1.mean() < 0.7


def test_contrast_scales_the_image_and_leaves_the_mask():
    full = generate_batch(MINI, split="train", seed=0, start=0, count=4)
    half = generate_batch(replace(MINI, contrast=0.5), split="train", seed=0, start=0, count=4)
    np.testing.assert_array_equal(full.masks, half.masks)
    assert np.abs(full.images / 2 - half.images).max() <= 1


def test_a_crowded_picture_fails_with_the_setting_to_change():
    crowded = replace(MINI, n_distractors=60, contour_tries=20, image_tries=3)
    with pytest.raises(GenerationError, match="n_distractors=60") as error:
        generate_batch(crowded, split="train", seed=0, start=0, count=1)
    assert "In 3 scenes" in str(error.value)
    assert "lower n_distractors" in str(error.value)
    knotted = replace(MINI, contour_length=60, contour_tries=20, image_tries=2, n_distractors=0)
    with pytest.raises(GenerationError, match=r"contour_length=60.*lower contour_length"):
        generate_batch(knotted, split="train", seed=0, start=0, count=1)


def test_long_contours_beyond_the_published_ones_can_be_made():
    config = PathfinderConfig(contour_length=40, n_distractors=5)
    assert generate_batch(config, split="train", seed=0, start=0, count=2).masks.any(axis=(1, 2)).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"contour_length": 1}, r"contour_length=1 .*\[2, 1000\]"),
        ({"contour_length": 14.0}, "contour_length=14.0 is not a whole number"),
        ({"padding": 1.0}, r"padding=1.*discs must fit"),
        ({"marker_radius": 9.0}, r"marker_radius=9.*hide the next dash"),
        ({"continuity": 0.5}, r"continuity=0.5.*fold back"),
        ({"dash_margin": float("nan")}, "dash_margin=nan is not a finite number"),
        ({"form": "detection"}, "form='detection' is unknown"),
        ({"form": "classification", "n_contours": 1}, "n_contours=1 is too few"),
        ({"image_size": True}, "image_size=True is not a whole number"),
    ],
)
def test_wrong_settings_name_value_range_and_remedy(settings, words):
    with pytest.raises(ValueError, match=words):
        PathfinderConfig(**settings)


def test_wrong_streams_and_presets_are_refused():
    with pytest.raises(ValueError, match="split='dev' is unknown"):
        generate_batch(MINI, split="dev", seed=0, start=0, count=1)
    with pytest.raises(ValueError, match="seed=-1"):
        generate_batch(MINI, split="train", seed=-1, start=0, count=1)
    with pytest.raises(ValueError, match="preset='tiny' is unknown"):
        PathfinderConfig.preset("tiny")
    with pytest.raises(TypeError, match="colour"):
        PathfinderConfig.preset("mini", colour=3)


def test_a_config_survives_its_dictionary():
    assert PathfinderConfig(**MINI.to_dict()) == MINI
    assert PathfinderConfig(padding=22).digest == PathfinderConfig(padding=22.0).digest
    assert PathfinderConfig(distractor_length=4).digest == PathfinderConfig().digest


def test_code_that_cannot_be_cached_is_compiled_with_a_warning():
    names: dict = {}
    exec("def double(x): return 2 * x", names)  # no file, so numba finds no place for its cache
    with pytest.warns(RuntimeWarning, match="set NUMBA_CACHE_DIR"):
        double = cached(names["double"])
    assert double(3) == 6
