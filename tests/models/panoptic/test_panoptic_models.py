"""The two models: training steps, results, instances that stop by themselves, memory, what they refuse."""

import importlib.util
import math
import sys
import warnings
from dataclasses import replace

import pytest
import torch
import yaml
from tiny_panoptic import STUFF, THINGS, tiny_image, tiny_settings, tiny_target
from torch import Tensor, nn

import crbp.models
from crbp import BPTT, RBP, Evolve, Neumann
from crbp.models import RFPN, PanopticFPN, PanopticResult
from crbp.models.panoptic import BackboneSettings, MaskSettings, mini_settings
from crbp.models.panoptic.backbone import Backbone
from crbp.models.panoptic.mask_head import RecurrentMaskHead, settle_each
from crbp.models.panoptic.semantic_head import SemanticHead
from crbp.models.panoptic.settings import SemanticSettings

LOSSES = {"rpn_class", "rpn_box", "box_class", "box_delta", "mask", "semantic"}
EVOLVE = Evolve(steps=4, gradient=RBP(Neumann(terms=3)))


class Penalty:
    weight = 0.25

    def __call__(self, run: crbp.Run) -> Tensor:
        return crbp.lipschitz_penalty(run, bound=0.1, reduction="sum_square")


def _fpn(**changes) -> PanopticFPN:
    return PanopticFPN(**tiny_settings(**changes))


def _rfpn(**changes) -> RFPN:
    return RFPN(**{"evolve": EVOLVE, **tiny_settings(**changes)})


def _batch(objects: int = 2):
    return [tiny_image(), tiny_image(50, 60)], [tiny_target(objects), tiny_target(objects, 50, 60)]


@pytest.mark.parametrize(
    "make",
    [
        _fpn,
        lambda: _rfpn(penalty=Penalty()),
        lambda: _fpn(backbone=BackboneSettings(norm="batch", channels=32)),
        lambda: _fpn(backbone=BackboneSettings(norm="group", channels=32, width=8)),
    ],
    ids=["fpn", "rfpn", "batchnorm", "narrow"],
)
def test_a_training_step_from_scratch_reaches_every_parameter(make):
    model = make()
    losses = model(*_batch())
    assert losses.keys() == LOSSES | ({"penalty"} if isinstance(model, RFPN) else set())
    assert all(loss.ndim == 0 and loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_scales_of_the_cells_norms_start_where_they_are_told():
    for given, scale in (({}, 0.1), ({"norm_scale": 0.5}, 0.5)):
        cell = _rfpn(**given).mask_head.cell
        for norm in (cell.inhibition_norm, cell.excitation_norm):
            assert torch.equal(norm.weight, torch.full_like(norm.weight, scale))


def test_the_gates_of_the_cell_span_what_they_are_told():
    evolve = crbp.Evolve(steps=40, gradient=crbp.RBP())
    for given, least, most in (({}, 20, 39), ({"horizon": 5}, 2, 4)):
        bias = _rfpn(evolve=evolve, **given).mask_head.cell.attention_bias.detach()
        assert least < bias.max().exp() <= most * (1 + 1e-6)
        assert bias.min() >= 0
    with pytest.raises(ValueError, match=r"horizon.*2"):
        _rfpn(horizon=2)


@pytest.mark.parametrize("make", [_fpn, lambda: _rfpn(penalty=Penalty())], ids=["fpn", "rfpn"])
def test_images_without_objects_train_on(make):
    """Every parameter gets a gradient, of zero where nothing was to be learnt, for which other processes may wait."""
    model = make()
    losses = model(*_batch(objects=0))
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["mask"] == losses["box_delta"] == losses["rpn_box"] == 0
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if "mask" in name:
            assert not parameter.grad.any(), name
    if isinstance(model, RFPN):
        assert losses["penalty"] == 0
        assert model.report is None
        assert model.mask_head.output_norm.running_mean.isfinite().all()


def test_frozen_norms_and_stages_stay():
    model = _fpn(backbone=BackboneSettings(channels=32))
    with pytest.warns(UserWarning, match="statistics are those of no data"):
        losses = model(*_batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        model(*_batch())
    sum(losses.values()).backward()
    body = model.backbone.body
    for frozen in (body.conv1, body.layer1):
        assert all(parameter.grad is None for parameter in frozen.parameters())
    assert all(parameter.grad is not None for parameter in body.layer2.parameters())
    assert not list(body.bn1.parameters())


def test_the_penalty_is_weighted_and_the_report_kept():
    model = _rfpn(penalty=Penalty())
    seen = []
    own = model.penalty.__call__
    model.penalty = lambda run: seen.append(own(run)) or seen[-1]
    model.penalty.weight = 0.25
    losses = model(*_batch())
    assert torch.equal(losses["penalty"], 0.25 * seen[0])
    assert model.report.steps == 4
    assert model.report.backward is None
    sum(losses.values()).backward()
    assert model.report.backward.terms == 3


def test_bfloat16_hardly_changes_the_losses():
    model, batch = _rfpn(), _batch()
    torch.manual_seed(1)
    exact = model(*batch)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*batch)
    assert rough.keys() == exact.keys()
    for name, loss in rough.items():
        assert loss.dtype == torch.float32, name
        assert abs(float((loss / exact[name]).detach()) - 1) < 0.2, name


@pytest.mark.parametrize("make", [_fpn, _rfpn], ids=["fpn", "rfpn"])
def test_results_at_the_original_sizes(make):
    model = make().eval()
    images, targets = _batch()
    results = model(images, sizes=[(128, 100), (25, 30)])
    for result, size in zip(results, [(128, 100), (25, 30)], strict=True):
        assert isinstance(result, PanopticResult)
        found = len(result.scores)
        assert 0 < found <= 4
        assert result.panoptic.shape == size
        assert result.boxes.shape == (found, 4)
        assert result.masks.shape == (found, *size)
        assert (result.boxes >= 0).all()
        assert (result.boxes <= torch.tensor([size[1], size[0]] * 2)).all()
        assert set(result.labels.tolist()) <= set(range(THINGS))
        assert {each["label"] for each in result.segments if not each["isthing"]} <= set(range(1, STUFF + 1))
        assert not any(tensor.requires_grad for tensor in (result.boxes, result.scores))
    assert [result.panoptic.shape for result in model(images)] == [(64, 64), (50, 60)]
    targets[0]["size"] = (10, 12)
    assert model(images, targets)[0].panoptic.shape == (10, 12)


def test_nothing_may_be_found():
    settings = tiny_settings()
    model = RFPN(**{**settings, "boxes": replace(settings["boxes"], score=1.0)}, evolve=EVOLVE, tolerance=0.1).eval()
    for image in (tiny_image(), tiny_image(33, 70)):
        result = model([image])[0]
        assert result.masks.shape == (0, *image.shape[1:])
        assert not any(segment["isthing"] for segment in result.segments)


@pytest.mark.parametrize("make", [_fpn, _rfpn], ids=["fpn", "rfpn"])
def test_what_the_merge_leaves_out_needs_no_mask(make):
    model = make().eval()
    image = tiny_image()
    scores = model([image])[0].scores
    model.merge = replace(model.merge, score=float(scores.sort().values[-2]))
    whole = model([image])[0]
    model.merged_only = True
    merged = model([image])[0]
    assert (len(whole.scores), len(merged.scores)) == (len(scores), 2)
    assert torch.equal(merged.panoptic, whole.panoptic)
    assert [each | {"instance": 0, "score": 0} for each in merged.segments] == [
        each | {"instance": 0, "score": 0} for each in whole.segments
    ]


def test_an_image_does_not_know_the_rest_of_its_batch():
    model = _rfpn().eval()
    images = [tiny_image(), tiny_image()]
    together, alone = model(images)[1], model(images[1:])[0]
    torch.testing.assert_close(together.boxes, alone.boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(together.scores, alone.scores, rtol=1e-4, atol=1e-5)


def test_chunks_change_nothing():
    whole = _rfpn().eval()
    chunked = _rfpn(masks=MaskSettings(channels=32, size=6, chunk=3)).eval()
    chunked.load_state_dict(whole.state_dict())
    image = [tiny_image()]
    for wanted, got in zip(whole(image), chunked(image), strict=True):
        assert torch.equal(wanted.panoptic, got.panoptic)
        assert torch.equal(wanted.masks, got.masks)


# The recurrence


def _head(gradient=None, steps: int = 6) -> RecurrentMaskHead:
    return RecurrentMaskHead(32, Evolve(steps=steps, gradient=gradient or BPTT())).double()


def _pooled(rows: int = 5) -> Tensor:
    return torch.randn(rows, 32, 6, 6).double() * torch.linspace(0.1, 6, rows).view(-1, 1, 1, 1)


def test_the_head_is_the_cell_in_plain_steps():
    head, pooled = _head().eval(), _pooled()
    state = torch.zeros_like(pooled)
    for _ in range(6):
        state = head.cell(state, pooled)
    seen = head(pooled)
    assert torch.equal(seen.features, head.output_norm(state))
    assert seen.run.report.steps == 6
    assert seen.steps is None


def test_each_instance_stops_as_it_would_alone():
    head, pooled = _head(steps=12).eval(), _pooled()
    head.tolerance = 0.05
    together = head(pooled)
    alone = Evolve(steps=12, tolerance=0.05)
    with torch.no_grad():
        for row in range(len(pooled)):
            drive = pooled[row : row + 1]
            run = alone(lambda state, drive=drive: head.cell(state, drive), torch.zeros_like(drive))
            assert together.steps[row] == run.report.steps
            wanted = head.output_norm(run.state)
            torch.testing.assert_close(together.features[row : row + 1], wanted, rtol=1e-10, atol=1e-10)
    assert len(set(together.steps.tolist())) > 1
    assert max(together.steps) < 12


def test_without_tolerance_each_instance_runs_to_the_end():
    head, pooled = _head().eval(), _pooled()
    wanted = head(pooled)
    head.tolerance = 0.0
    seen = head(pooled)
    assert seen.steps.tolist() == [6] * 5
    torch.testing.assert_close(seen.features, wanted.features, rtol=1e-10, atol=1e-10)


def test_instances_that_stay_zero_have_settled():
    state, steps = settle_each(
        lambda state, drive: state * 0, torch.zeros(2, 3), torch.zeros(2, 3), steps=5, tolerance=0.1
    )
    assert steps.tolist() == [1, 1]
    assert not state.any()


def test_an_instance_that_diverges_is_told():
    head, pooled = _head().eval(), _pooled()
    head.tolerance = 0.1
    pooled[1] = math.nan
    with pytest.raises(crbp.DivergenceError, match="not finite within 6 steps"):
        head(pooled)


def test_steps_may_be_changed():
    model = _rfpn().eval()
    assert model.steps == 4
    pooled = torch.randn(2, 32, 6, 6)
    model.steps = 9
    assert model.mask_head(pooled).run.report.steps == 9
    assert model.mask_head.evolve.gradient == EVOLVE.gradient
    with pytest.raises(ValueError, match=r"steps .* not 0"):
        model.steps = 0


def test_steps_of_instances_are_in_the_results():
    model = _rfpn(tolerance=0.3).eval()
    result = model([tiny_image()])[0]
    assert result.steps.shape == result.scores.shape
    assert (result.steps >= 1).all()
    assert (result.steps <= 4).all()


@pytest.mark.parametrize("score", [0.0, 1.0], ids=["found", "nothing found"])
def test_unrolled_it_is_the_model_after_each_number_of_steps(score: float) -> None:
    images, sizes = [tiny_image(), tiny_image(50, 60)], [(64, 64), (100, 120)]
    model = _rfpn(tolerance=0.9, boxes=replace(tiny_settings()["boxes"], score=score)).eval()
    unrolled = list(model.unroll(images, steps=6, sizes=sizes))
    assert model.steps == 4
    assert len(unrolled) == 6
    model.mask_head.tolerance = None
    for taken, results in enumerate(unrolled, start=1):
        model.steps = taken
        for result, wanted in zip(results, model(images, sizes=sizes), strict=True):
            assert (len(result.labels) > 0) == (score == 0)
            for name in ("panoptic", "boxes", "scores", "labels", "masks"):
                assert torch.equal(getattr(result, name), getattr(wanted, name))
            assert result.segments == wanted.segments
            assert result.steps is None


def test_unrolling_refuses_training_and_tells_of_divergence() -> None:
    model = _rfpn()
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        next(model.unroll([tiny_image()]))
    model.eval()
    with pytest.raises(ValueError, match=r"steps .* not 0"):
        next(model.unroll([tiny_image()], steps=0))
    assert len(list(model.unroll([tiny_image()]))) == model.steps
    with pytest.raises(crbp.DivergenceError, match="not finite within 1 steps"):
        next(model.mask_head.unroll(torch.full((1, 32, 6, 6), math.nan), steps=2))


def _saved(head: RecurrentMaskHead, steps: int) -> int:
    pooled = _pooled()
    head.steps = steps
    with crbp.activation_memory(exclude=[*head.parameters(), pooled]) as memory:
        seen = head(pooled)
        crbp.lipschitz_penalty(seen.run)
    return memory.bytes


def test_memory_of_the_head_does_not_grow_with_its_steps():
    head = _head(RBP())
    assert _saved(head, 3) == _saved(head, 12)
    head = _head(BPTT())
    assert _saved(head, 12) > 3 * _saved(head, 3)


# The semantic head


def test_the_semantic_loss_is_the_mean_over_what_is_not_void():
    head = SemanticHead(32, 5, SemanticSettings(channels=32, weight=0.5))
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    target = torch.randint(0, 5, (2, 16, 16))
    target[0, :9] = 255
    full = nn.functional.interpolate(logits, size=(16, 16), mode="bilinear")
    wanted = nn.functional.cross_entropy(full, target, ignore_index=255) / 2
    torch.testing.assert_close(head.loss(logits, target), wanted)
    void = head.loss(logits, torch.full_like(target, 255))
    assert void == 0
    assert void.requires_grad


def test_padding_is_void():
    model = _fpn()
    image, target = tiny_image(40, 40), tiny_target(1, 40, 40)
    seen = []
    model.semantic_head.loss = lambda logits, maps: seen.append(maps) or logits.sum() * 0
    model([image], [target])
    assert seen[0].shape == (1, 64, 64)
    assert torch.equal(seen[0][0, :40, :40], target["semantic"])
    assert (seen[0][0, 40:] == 255).all()
    assert (seen[0][0, :, 40:] == 255).all()


# Settings and mistakes

CONFIG = """
class_path: crbp.models.RFPN
init_args:
  depth: 18
  things: 3
  stuff: 2
  evolve:
    steps: 7
    gradient: {class_path: crbp.RBP, init_args: {solver: {class_path: crbp.Neumann, init_args: {terms: 4}}}}
  penalty: {class_path: crbp.tasks.LipschitzPenalty, init_args: {weight: 0.001, bound: 0.95, reduction: sum_square}}
  backbone: {norm: group, channels: 32}
  proposals: {anchor_sizes: [8, 16, 24, 32, 48], samples: 32}
  masks: {channels: 32}
  merge: {stuff_area: 64}
"""


def test_a_model_is_made_from_yaml():
    from crbp.tasks.weights import build

    model = build(nn.Module, yaml.safe_load(CONFIG), "the model")
    assert isinstance(model, RFPN)
    assert model.steps == 7
    assert model.mask_head.evolve.gradient == RBP(Neumann(terms=4))
    assert model.penalty.weight == 0.001
    assert model.merge.stuff_area == 64
    assert model.merge.overlap == 0.5
    assert model.rpn.anchor_generator.sizes == ((8,), (16,), (24,), (32,), (48,))


def test_without_torchvision_the_extra_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else found(name))
    for name in [name for name in sys.modules if name.startswith("crbp.models.panoptic")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"needs torchvision, .* pip install 'crbp\[panoptic\]'"):
        crbp.models.RFPN  # noqa: B018
    assert crbp.models.PathfinderNet is not None


def test_mini_settings_make_both_models():
    for kind in (PanopticFPN, RFPN):
        with torch.device("meta"):
            model = kind(things=8, stuff=4, **mini_settings(192))
        assert model.depth == 18


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PanopticFPN(34), "depth must be one of 18, 50, 101, not 34"),
        (lambda: PanopticFPN(18, things=0), "things .* not 0"),
        (lambda: PanopticFPN(18, stuff=255), "stuff must be at most 254, not 255: label 255 is void"),
        (lambda: BackboneSettings(norm="layer"), "one of 'frozen', 'group', 'batch', not 'layer'"),
        (lambda: BackboneSettings(norm="group", frozen_stages=2), "frozen_stages=2 needs norm='frozen'"),
        (lambda: BackboneSettings(frozen_stages=6), "from 0 to 5, not 6"),
        (lambda: SemanticSettings(channels=48), "multiple of 32, not 48"),
        (lambda: MaskSettings(chunk=0), "chunk .* not 0"),
        (lambda: _rfpn(masks=MaskSettings(channels=64)), "pyramid's 32 channels.* not to 64"),
        (lambda: _rfpn(tolerance=-1.0), "tolerance .* not -1.0"),
    ],
)
def test_bad_settings_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def _changed(**changes):
    return [tiny_target() | changes]


def _labelled(label: int, *, objects: int = 2):
    target = tiny_target(objects)
    target["semantic"][50, 3] = label
    return [target]


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (None, "training needs targets"),
        ([], "1 images and 0 targets"),
        ([{"image_id": 3}], r"target 0 \(image 3\) lacks boxes, labels, masks, semantic"),
        (_changed(boxes=torch.tensor([[0.0, 0, 5, 5], [3, 3, 3, 9]])), r"image 7\) has a box without area"),
        (_changed(labels=torch.tensor([0, THINGS])), rf"outside 0 … {THINGS - 1}: \[0, {THINGS}\]"),
        (_changed(labels=torch.tensor([0])), r"labels of shape \(1,\), not \(2,\)"),
        (_changed(masks=torch.zeros(2, 64, 63)), r"masks of shape \(2, 64, 63\), not \(2, 64, 64\)"),
        (
            _labelled(STUFF + 1),
            rf"target 0 \(image 7\) .*semantic labels outside 0 … {STUFF} .* {STUFF + 1}, 255",
        ),
        (_labelled(-1), rf"semantic labels outside 0 … {STUFF} and 255: \[-1, "),
        (_labelled(STUFF + 1, objects=0), "semantic labels outside"),
        (_changed(semantic=torch.zeros(60, 64)), r"semantic of shape \(60, 64\), not \(64, 64\)"),
    ],
)
def test_bad_targets_are_named(targets, named):
    with torch.device("meta"):
        model = _fpn()
    model.pixel_mean, model.pixel_std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    with pytest.raises(ValueError, match=named):
        model([tiny_image()], targets)


@pytest.mark.parametrize(
    ("images", "sizes", "named"),
    [
        ([], None, "no image"),
        ([torch.zeros(1, 4, 4)], None, r"image 0 must be RGB of shape \(3, H, W\), not \(1, 4, 4\)"),
        ([torch.zeros(3, 0, 4)], None, r"not \(3, 0, 4\)"),
        ([torch.zeros(3, 8, 8)], [(8, 8), (8, 8)], "1 images and 2 sizes"),
    ],
)
def test_bad_images_are_named(images, sizes, named):
    with torch.device("meta"):
        model = _fpn().eval()
    model.pixel_mean, model.pixel_std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    with pytest.raises(ValueError, match=named):
        model(images, sizes=sizes)


@pytest.mark.parametrize(
    ("channels", "groups"), [(64, 32), (128, 32), (16, 8), (32, 16), (48, 16), (12, 4), (7, 1), (1, 1)]
)
def test_groups_of_a_norm_have_two_channels_or_more(channels, groups):
    backbone = Backbone(18, BackboneSettings(norm="group", width=channels, channels=32))
    norm = backbone.body.layer1[0].bn1
    assert (norm.num_groups, norm.num_channels) == (groups, channels)
