"""The panoptic merge and what comes before it: properties on random cases."""

import pytest
import torch

from crbp.models.panoptic import MergeSettings, merge_panoptic, paste_masks
from crbp.models.panoptic.results import semantic_map

SIZE = (24, 30)


def _case():
    masks = torch.rand(8, *SIZE) < torch.rand(8, 1, 1)
    masks[2] = False
    semantic = torch.randint(0, 4, SIZE)
    return masks, torch.rand(8), torch.randint(0, 5, (8,)), semantic


@pytest.mark.parametrize("seed", range(5))
def test_segments_partition_what_is_not_void(seed):
    torch.manual_seed(seed)
    masks, scores, labels, semantic = _case()
    settings = MergeSettings(score=0.3, overlap=0.6, stuff_area=50)
    panoptic, segments = merge_panoptic(masks, scores, labels, semantic, settings)
    assert panoptic.dtype == torch.int32
    assert panoptic.shape == SIZE
    assert [segment["id"] for segment in segments] == list(range(1, len(segments) + 1))
    assert set(panoptic.unique().tolist()) - {0} == {segment["id"] for segment in segments}
    things = [segment for segment in segments if segment["isthing"]]
    assert segments[: len(things)] == things
    assert [each["score"] for each in things] == sorted((each["score"] for each in things), reverse=True)
    covered = torch.zeros(SIZE, dtype=torch.bool)
    for segment in segments:
        pixels = panoptic == segment["id"]
        assert int(pixels.sum()) == segment["area"] > 0
        if segment["isthing"]:
            own = masks[segment["instance"]]
            assert torch.equal(pixels, own & ~covered)
            assert int((own & covered).sum()) / int(own.sum()) <= settings.overlap
            assert segment["score"] == float(scores[segment["instance"]]) >= settings.score
            assert segment["label"] == int(labels[segment["instance"]])
        else:
            assert torch.equal(pixels, (semantic == segment["label"]) & ~covered)
            assert segment["area"] >= settings.stuff_area
            assert segment["label"] != 0
        covered |= pixels
    for label in set(range(1, 4)) - {each["label"] for each in segments if not each["isthing"]}:
        instances = torch.isin(panoptic, torch.tensor([each["id"] for each in things]))
        assert int(((semantic == label) & ~instances).sum()) < settings.stuff_area


@pytest.mark.parametrize("seed", range(5))
def test_an_instance_is_left_out_only_for_its_score_or_for_what_covers_it(seed):
    torch.manual_seed(seed)
    masks, scores, labels, semantic = _case()
    settings = MergeSettings(score=0.3, overlap=0.6)
    kept = {
        each["instance"] for each in merge_panoptic(masks, scores, labels, semantic, settings)[1] if each["isthing"]
    }
    assert kept
    for instance, mask in enumerate(masks):
        better = [other for other in kept if scores[other] > scores[instance]]
        covered = int((mask & masks[better].any(dim=0)).sum())
        fits = bool(mask.any()) and covered / int(mask.sum()) <= settings.overlap
        assert (instance in kept) == (float(scores[instance]) >= settings.score and fits)


def test_nothing_is_seen_in_an_image_of_things_without_detections():
    panoptic, segments = merge_panoptic(
        torch.zeros(0, *SIZE, dtype=torch.bool), torch.zeros(0), torch.zeros(0).long(), torch.zeros(SIZE).long()
    )
    assert not panoptic.any()
    assert segments == []


def test_the_published_thresholds_are_the_defaults():
    assert MergeSettings() == MergeSettings(score=0.5, overlap=0.5, stuff_area=4096)


def test_a_score_at_the_threshold_and_half_an_overlap_are_kept():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, :, :2] = True
    masks[1, :2] = True
    _, segments = merge_panoptic(masks, torch.tensor([0.9, 0.5]), torch.tensor([0, 1]), torch.zeros(4, 4).long())
    assert [segment["area"] for segment in segments] == [8, 4]


def test_a_full_mask_covers_the_pixels_whose_centres_lie_in_its_box():
    """Between the outer samples of the mask and the box's edge it falls off to one half, so all of the box is in it."""
    boxes = torch.tensor([[2.3, 4.6, 20.4, 17.7], [-5.0, -5.0, 8.0, 40.0]])
    pasted = paste_masks(torch.ones(2, 28, 28), boxes, SIZE)
    x, y = torch.arange(SIZE[1]) + 0.5, torch.arange(SIZE[0]) + 0.5
    for mask, (left, top, right, bottom) in zip(pasted, boxes.tolist(), strict=True):
        wanted = ((y > top) & (y < bottom))[:, None] & ((x > left) & (x < right))[None]
        inner = ((y > top + 0.5) & (y < bottom - 0.5))[:, None] & ((x > left + 0.5) & (x < right - 0.5))[None]
        assert not (mask & ~wanted).any()
        assert mask[inner].all()


def test_pasting_into_a_box_of_the_masks_size_keeps_every_pixel():
    masks = (torch.rand(3, 12, 12) < 0.5).float()
    boxes = torch.tensor([[3.0, 5, 15, 17], [18, 12, 30, 24], [0, 0, 12, 12]])
    pasted = paste_masks(masks, boxes, SIZE)
    for mask, image, box in zip(masks.bool(), pasted, boxes.int().tolist(), strict=True):
        left, top, right, bottom = box
        assert torch.equal(image[top:bottom, left:right], mask)
        assert int(image.sum()) == int(mask.sum())


def test_boxes_outside_the_image_paste_nothing():
    outside = torch.tensor([[-30.0, 0, -20, 10], [0, 50, 10, 60], [40, 0, 50, 10]])
    assert not paste_masks(torch.ones(3, 4, 4), outside, SIZE).any()
    assert paste_masks(torch.ones(0, 4, 4), torch.zeros(0, 4), SIZE).shape == (0, *SIZE)


def test_the_semantic_map_is_cut_to_the_image_before_it_is_resized():
    logits = torch.zeros(2, 8, 8)
    logits[0] = 0.5
    logits[1, :, :4] = 1  # the left 16 of 32 columns
    found = semantic_map(logits, (24, 20), (48, 40))
    assert found.shape == (48, 40)
    assert torch.equal(found, (torch.arange(40) < 32).long().expand(48, 40))
