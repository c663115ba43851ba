"""What is measured over the steps equals what each single run says."""

import pytest
import torch

import crbp
from crbp.analysis import follow, memory_curve
from crbp.models import PathfinderNet


def _net(steps=3):
    torch.manual_seed(0)
    return PathfinderNet(crbp.cells.HGRU(4, 3, norm_scale=1.0), crbp.Evolve(steps=steps), target_share=0.4)


def _batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.rand(n, 1, 9, 9, generator=generator), torch.rand(n, 9, 9, generator=generator) > 0.5) for n in (2, 3)
    ]


def test_each_step_of_a_trajectory_equals_a_run_of_so_many_steps():
    net, batches = _net(), _batches()
    found = follow(net, batches, steps=4)
    for t in range(1, 5):
        hits = marked = residual = 0.0
        for image, mask in batches:
            with torch.no_grad():
                traced = net(image, steps=t).logits.argmax(1).bool()
                single = [net(one[None], steps=t).run.report.residual for one in image]
            hits += float((traced & mask).sum())
            marked += float(traced.sum() + mask.sum())
            residual += sum(single)
        assert found.f1[t - 1].item() == pytest.approx(2 * hits / marked)
        assert found.residual[t - 1].item() == pytest.approx(residual / 5, rel=1e-4)


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="no image"):
        follow(_net(), [], steps=2)


def test_the_memory_curve_leaves_the_model_as_it_was():
    net = _net()
    before = net.evolve
    image = torch.rand(1, 1, 9, 9)
    flat = memory_curve(net, image, gradient=crbp.RBP(), steps=(2, 5), penalty=crbp.lipschitz_penalty)
    rising = memory_curve(net, image, gradient=crbp.BPTT(), steps=(2, 3, 4))
    assert flat[0] == flat[1]
    assert rising[2] - rising[1] == rising[1] - rising[0] > 0
    assert net.evolve is before
