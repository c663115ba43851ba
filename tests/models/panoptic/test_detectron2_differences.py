"""Where torchvision's parts differ from detectron2's: each difference, as detectron2 has it."""

import math

import pytest
import torch
from tiny_panoptic import THINGS, tiny_settings
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.resnet import Bottleneck
from torchvision.ops import remove_small_boxes
from torchvision.ops.poolers import LevelMapper

from crbp.errors import DivergenceError
from crbp.models.panoptic import (
    BackboneSettings,
    BoxSettings,
    MaskSettings,
    MergeSettings,
    PanopticFPN,
    PixelSettings,
    ProposalSettings,
)
from crbp.models.panoptic._pool import PyramidPool
from crbp.models.panoptic.backbone import LEVELS, STRIDES, Backbone
from crbp.models.panoptic.box_head import BoxPredictor, Detections, InstanceHeads
from crbp.models.panoptic.mask_head import ConvolutionalMaskHead, mask_targets
from crbp.models.panoptic.results import panoptic_result
from crbp.models.panoptic.rpn import ProposalNetwork


@pytest.mark.parametrize(("first", "wanted"), [(True, (2, 1)), (False, (1, 2))])
def test_place_of_the_stride(first, wanted):
    with torch.device("meta"):
        body = Backbone(50, BackboneSettings(stride_in_1x1=first)).body
    for stage in (body.layer2, body.layer3, body.layer4):
        assert isinstance(stage[0], Bottleneck)
        assert (stage[0].conv1.stride[0], stage[0].conv2.stride[0]) == wanted
        assert (stage[1].conv1.stride[0], stage[1].conv2.stride[0]) == (1, 1)


def test_levels_have_their_strides_and_the_last_is_every_second_of_p5():
    settings = tiny_settings()["backbone"]
    features = Backbone(18, settings)(torch.randn(1, 3, 96, 160))
    for name, stride in zip(LEVELS, STRIDES, strict=True):
        assert features[name].shape == (1, 32, math.ceil(96 / stride), math.ceil(160 / stride))
    assert torch.equal(features["p6"], features["p5"][:, :, ::2, ::2])


# Anchors and proposals


def test_anchors_have_their_areas_and_ratios_and_fixed_strides():
    rpn = ProposalNetwork(8, ProposalSettings())
    shapes = [(25, 34), (13, 17), (7, 9), (4, 5), (2, 3)]  # 100 × 136: P6 would get strides 50 and 45 from the sizes
    images = ImageList(torch.zeros(2, 3, 100, 136), [(100, 136), (90, 100)])
    anchors = rpn.anchor_generator(images, [torch.zeros(2, 8, *shape) for shape in shapes])
    assert torch.equal(anchors[0], anchors[1])
    start = 0
    for (rows, columns), stride, size in zip(shapes, STRIDES, (32, 64, 128, 256, 512), strict=True):
        own = anchors[0][start : start + 3 * rows * columns].double().view(rows, columns, 3, 4)
        start += 3 * rows * columns
        width, height = own[..., 2] - own[..., 0], own[..., 3] - own[..., 1]
        torch.testing.assert_close(width * height, torch.full_like(width, size**2), rtol=1e-5, atol=0)
        ratios = torch.tensor([0.5, 1.0, 2.0]).double().expand_as(width)
        torch.testing.assert_close(height / width, ratios, rtol=1e-5, atol=0)
        x, y = (own[..., 0] + own[..., 2]) / 2, (own[..., 1] + own[..., 3]) / 2
        wanted = torch.arange(columns)[None, :, None].double() * stride
        torch.testing.assert_close(x, wanted.expand_as(x), rtol=0, atol=1e-4)
        wanted = torch.arange(rows)[:, None, None].double() * stride
        torch.testing.assert_close(y, wanted.expand_as(y), rtol=0, atol=1e-4)
    assert start == len(anchors[0])
    assert anchors[0].frac().any()


def _rpn(**changes):
    return ProposalNetwork(8, ProposalSettings(**{"samples": 16, **changes}))


def test_proposal_losses_are_l1_and_divided_by_what_was_asked_for():
    rpn, images, anchors = _rpn(), 2, 10  # 10 anchors an image, of the 16 that are asked for
    labels = [torch.tensor([1.0] * 2 + [0.0] * 6 + [-1.0] * 2) for _ in range(images)]
    wanted = [torch.zeros(anchors, 4) for _ in range(images)]
    deltas = torch.full((images * anchors, 4), 0.01)  # where a smooth L1 would be quadratic
    by_class, by_box = rpn.compute_loss(torch.zeros(images * anchors, 1), deltas, labels, wanted)
    torch.testing.assert_close(by_class, torch.tensor(images * 8 * math.log(2) / (16 * images)))
    torch.testing.assert_close(by_box, torch.tensor(images * 2 * 4 * 0.01 / (16 * images)))


def test_proposals_are_ordered_by_logits_where_probabilities_are_equal():
    rpn = _rpn(after_nms_test=2).eval()
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]])
    logits = torch.tensor([[[40.0], [60.0], [50.0]]])
    assert logits.sigmoid().unique().numel() == 1
    found, scores = rpn.filter_proposals(boxes, logits, [(60, 60)], [3])
    assert scores[0].tolist() == [60.0, 50.0]
    assert found[0].tolist() == [[20.0, 0, 30, 10], [40, 0, 50, 10]]


def test_proposals_of_different_levels_do_not_suppress_one_another():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10]]])
    logits = torch.tensor([[[2.0], [1.0]]])
    assert len(_rpn().eval().filter_proposals(boxes, logits, [(60, 60)], [1, 1])[0][0]) == 2
    assert len(_rpn().eval().filter_proposals(boxes, logits, [(60, 60)], [2])[0][0]) == 1


@pytest.mark.parametrize("training", [True, False])
def test_numbers_of_proposals(training):
    rpn = _rpn(before_nms=6, after_nms=5, before_nms_test=4, after_nms_test=3).train(training)
    left = torch.arange(10.0) * 20
    boxes = torch.stack([left, left * 0, left + 10, left * 0 + 10], dim=1)[None]
    found, _ = rpn.filter_proposals(boxes, torch.randn(1, 10, 1), [(60, 300)], [10])
    assert len(found[0]) == (5 if training else 3)
    rpn = _rpn(before_nms=2, after_nms=5, before_nms_test=1, after_nms_test=3).train(training)
    found, _ = rpn.filter_proposals(boxes, torch.randn(1, 10, 1), [(60, 300)], [5, 5])
    assert len(found[0]) == (4 if training else 2)


def test_the_defaults_keep_the_published_numbers():
    settings = ProposalSettings()
    assert (settings.before_nms, settings.after_nms) == (2000, 1000)
    assert (settings.before_nms_test, settings.after_nms_test) == (1000, 1000)


def test_a_proposal_has_any_area_but_none():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [30, 30, 30.0005, 30.0005], [-20, 0, -10, 10], [40, 40, 50, 40]]])
    given = boxes, torch.tensor([[[4.0], [3], [2], [1]]]), [(60, 60)], [4]
    rpn = _rpn().eval()
    assert torch.equal(rpn.filter_proposals(*given)[0][0], boxes[0, :2])
    assert torch.equal(RegionProposalNetwork.filter_proposals(rpn, *given)[0][0], boxes[0, :1])


def test_proposals_that_are_not_finite_end_training_and_are_dropped_in_evaluation():
    boxes = torch.tensor([[[0.0, 0, math.nan, 10], [0, 0, 10, 10]]])
    with pytest.raises(DivergenceError, match="lower the learning rate"):
        _rpn().filter_proposals(boxes, torch.zeros(1, 2, 1), [(60, 60)], [2])
    assert len(_rpn().eval().filter_proposals(boxes, torch.zeros(1, 2, 1), [(60, 60)], [2])[0][0]) == 1


# Pooling


def test_pooling_is_aligned():
    """On a ramp, whose value at a pixel is the place of its centre, each cell pools the place of its own centre."""
    pool = PyramidPool(4, 1024)  # every box from P2
    ramp = (torch.arange(40.0) + 0.5) * 4
    features = {name: ramp.expand(1, 1, 40, 40) for name in LEVELS}
    pooled = pool(features, [torch.tensor([[21.0, 30.0, 87.0, 93.0]])])
    centres = 21 + 66 * (torch.arange(4.0) + 0.5) / 4
    torch.testing.assert_close(pooled[0, 0], centres.expand(4, 4), rtol=1e-5, atol=1e-4)


def test_pooling_samples_every_pixel_of_a_cell():
    """A cell of 8 × 8 pixels takes 8 × 8 samples; two would miss most of what changes from pixel to pixel."""
    stripes = torch.zeros(1, 1, 64, 64)
    stripes[..., ::4] = 1
    pooled = PyramidPool(4, 10_000)(dict.fromkeys(LEVELS, stripes), [torch.tensor([[32.0, 32.0, 160.0, 160.0]])])
    torch.testing.assert_close(pooled, torch.full_like(pooled, 0.25))


@pytest.mark.parametrize(
    ("side", "level"), [(224, 4), (223.9, 3), (447.9, 4), (448, 5), (112, 3), (55, 2), (5, 2), (4000, 5)]
)
def test_levels_of_boxes(side, level):
    boxes = torch.tensor([[3.0, 5.0, 3 + side * 2, 5 + side / 2]])
    assert PyramidPool(7, 224).levels(boxes).tolist() == [level - 2]


@pytest.mark.parametrize(
    ("short", "level", "dtype"), [(5e-9, 3, torch.float64), (5e-8, 2, torch.float64), (1.2e-7, 2, torch.float32)]
)
def test_a_box_is_lifted_to_the_next_level_by_an_epsilon_of_its_size(short, level, dtype):
    """One of half the canonical size, but for a little; torchvision adds its epsilon to the level, and lifts more."""
    boxes = torch.tensor([[0, 0, 1, 1]]).to(dtype) * 224 * (0.5 - short)
    assert PyramidPool(7, 224).levels(boxes).tolist() == [level - 2]
    assert LevelMapper(2, 5)([boxes]).tolist() == [3 - 2]


def test_pooled_boxes_keep_their_order():
    pool = PyramidPool(2, 64)
    features = {
        name: torch.full((2, 1, 256 // stride, 256 // stride), float(stride)) * torch.tensor([1, -1]).view(2, 1, 1, 1)
        for name, stride in zip(LEVELS, STRIDES, strict=True)
    }
    boxes = [torch.tensor([[100.0, 100, 100 + side, 100 + side] for side in sides]) for sides in ([65, 10, 33], [130])]
    assert pool(features, boxes)[:, 0, 0, 0].tolist() == [16, 4, 8, -32]
    assert pool(features, [torch.zeros(0, 4)] * 2).shape == (0, 1, 2, 2)


# Boxes and classes


def _heads(**changes) -> InstanceHeads:
    boxes = BoxSettings(**{"channels": 8, "size": 2, "samples": 8, **changes})
    masks = MaskSettings(channels=8, size=2)
    return InstanceHeads(8, THINGS, 32, boxes=boxes, masks=masks, mask_head=ConvolutionalMaskHead(8, 8))


def test_the_background_is_the_last_class_and_has_no_box():
    predictor = BoxPredictor(8, THINGS)
    scores, deltas = predictor(torch.randn(5, 8))
    assert scores.shape == (5, THINGS + 1)
    assert deltas.shape == (5, 4 * THINGS)
    boxes = [torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])]
    logits = torch.full((2, THINGS + 1), -20.0)
    logits[0, THINGS] = logits[1, 0] = 20
    found, _, labels = _heads().postprocess_detections(logits, torch.zeros(2, 4 * THINGS), boxes, [(60, 60)])
    assert labels[0].tolist() == [0]
    assert found[0].tolist() == [[20.0, 20, 40, 40]]


def test_box_losses_are_l1_over_all_samples():
    heads = _heads()
    classes = torch.tensor([THINGS, 1, THINGS, 0])
    deltas = torch.zeros(4, THINGS, 4)
    deltas[1, 1] = 0.01
    deltas[1, 0] = deltas[0] = 5  # of another class, and of the background
    scores = torch.zeros(4, THINGS + 1)
    losses = heads._box_losses(scores, deltas.flatten(1), classes, torch.zeros(4, 4))
    torch.testing.assert_close(losses["box_delta"], torch.tensor(4 * 0.01 / 4))
    torch.testing.assert_close(losses["box_class"], torch.tensor(math.log(THINGS + 1)))


def test_samples_hold_the_objects_and_their_classes():
    heads = _heads(samples=8)
    target = {
        "boxes": torch.tensor([[0.0, 0, 20, 20], [30, 30, 50, 50]]),
        "labels": torch.tensor([0, 2]),
        "masks": torch.ones(2, 64, 64, dtype=torch.bool),
    }
    features = {
        name: torch.randn(1, 8, 64 // stride, 64 // stride) for name, stride in zip(LEVELS, STRIDES, strict=True)
    }
    seen = {}

    def keep(scores, deltas, classes, wanted):
        seen["classes"], seen["wanted"] = classes, wanted
        return {}

    heads._box_losses = keep
    far = torch.tensor([[100.0 + 10 * i, 100, 120 + 10 * i, 120] for i in range(20)])
    heads.losses(features, [far], [target])
    classes = seen["classes"].tolist()
    assert sorted(classes) == [0, 2] + [THINGS] * 6  # a quarter of eight on objects, which are among the proposals
    assert not seen["wanted"][[classes.index(0), classes.index(2)]].any()
    assert target["labels"].tolist() == [0, 2]


def test_detections_are_suppressed_within_their_class_only():
    boxes = [torch.tensor([[0.0, 0, 20, 20]] * 3)]
    logits = torch.tensor([[3.0, 0, 0, 0], [2, 0, 0, 0], [0, 2, 0, 0]])
    heads = _heads(score=0.5)
    _, scores, labels = heads.postprocess_detections(logits, torch.zeros(3, 4 * THINGS), boxes, [(60, 60)])
    assert labels[0].tolist() == [0, 1]
    assert scores[0].tolist() == sorted(scores[0].tolist(), reverse=True)
    assert (
        len(_heads(score=0.5, detections=1).postprocess_detections(logits, torch.zeros(3, 12), boxes, [(60, 60)])[0][0])
        == 1
    )


def test_box_deltas_are_weighted():
    """A delta of (10, 10, 5, 5) shifts by one width and height and stretches by e."""
    heads = _heads(score=0.1)
    logits = torch.tensor([[5.0, -5, -5, -5]])
    deltas = torch.zeros(1, THINGS, 4)
    deltas[0, 0] = torch.tensor([10.0, -10.0, 5.0, 5.0])
    boxes = [torch.tensor([[100.0, 100, 110, 120]])]
    found = heads.postprocess_detections(logits, deltas.flatten(1), boxes, [(400, 400)])[0][0]
    wide, high = 10 * math.e, 20 * math.e
    wanted = torch.tensor([[115 - wide / 2, 90 - high / 2, 115 + wide / 2, 90 + high / 2]])
    torch.testing.assert_close(found, wanted)


def test_a_detection_has_any_area_at_the_original_size_but_none():
    boxes = torch.tensor([[20.997, 20.997, 21.003, 21.003], [0, 8, 0, 30], [32, 32, 60, 60]])
    logits = torch.tensor([[3.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 1, 0]])
    heads = _heads(score=0.4)
    found = heads.postprocess_detections(logits, torch.zeros(3, 4 * THINGS), [boxes], [(64, 64)])
    box, score, label = (each[0] for each in found)
    assert label.tolist() == [0, 1, 2]
    assert remove_small_boxes(box, 0.01).tolist() == [2]
    detections = Detections(boxes=box, scores=score, labels=label, masks=torch.ones(3, 4, 4))
    result = panoptic_result(detections, torch.zeros(3, 16, 16), (64, 64), (32, 32), MergeSettings(score=0.0))
    assert result.labels.tolist() == [0, 2]
    torch.testing.assert_close(result.boxes, boxes[[0, 2]] / 2)
    assert torch.equal(result.scores, score[[0, 2]])
    assert result.masks[0].nonzero().tolist() == [[10, 10]]  # the pixel whose centre is in the box


# Masks and pixels


def test_mask_targets_are_the_bitmap_within_the_box():
    masks = torch.rand(2, 40, 50) < 0.5
    boxes = torch.tensor([[5.0, 7, 33, 35], [11, 2, 39, 30]])
    found = mask_targets(masks, boxes, torch.tensor([1, 0]), 28)
    assert found.dtype == torch.bool
    assert torch.equal(found[0], masks[1, 7:35, 5:33])
    assert torch.equal(found[1], masks[0, 2:30, 11:39])


def test_mask_targets_of_large_boxes_are_the_majority_of_each_cell():
    masks = torch.rand(1, 56, 56) < 0.5
    found = mask_targets(masks, torch.tensor([[0.0, 0, 56, 56]]), torch.tensor([0]), 7)
    assert torch.equal(found, nn.functional.avg_pool2d(masks.float(), 8) >= 0.5)


@pytest.mark.parametrize("pixels", [PixelSettings(), PixelSettings.torchvision()])
def test_pixels_are_scaled_and_padded_with_zeros(pixels):
    model = PanopticFPN(**tiny_settings(pixels=pixels))
    image = torch.zeros(3, 33, 20, dtype=torch.uint8)
    image[0] = 200  # red
    batch = model.batch([image, torch.zeros(3, 10, 40)])
    assert batch.tensors.shape == (2, 3, 64, 64)
    assert batch.image_sizes == [(33, 20), (10, 40)]
    rgb = (200, 0, 0) if pixels.order == "rgb" else (0, 0, 200)
    wanted = [(value - mean) / std for value, mean, std in zip(rgb, pixels.mean, pixels.std, strict=True)]
    torch.testing.assert_close(batch.tensors[0, :, 32, 19], torch.tensor(wanted))
    assert not batch.tensors[0, :, 33:].any()
    assert not batch.tensors[0, :, :, 20:].any()


def test_weights_start_as_detectron2_does():
    model = PanopticFPN(**tiny_settings(masks=MaskSettings(channels=32)))
    for layer, deviation in {
        model.rpn.head.cls_logits: 0.01,
        model.rpn.head.bbox_pred: 0.01,
        model.roi_heads.box_predictor.cls_score: 0.01,
        model.roi_heads.box_predictor.bbox_pred: 0.001,
        model.roi_heads.mask_predictor.mask_fcn_logits: 0.001,
    }.items():
        assert abs(float(layer.weight.detach().std()) / deviation - 1) < 0.5
    heads = (model.rpn, model.roi_heads, model.backbone.fpn, model.semantic_head.predictor)
    for module in (layer for head in heads for layer in head.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d) and module.bias is not None:
            assert not module.bias.any()
