"""What is measured over the steps equals what each single run says."""

import pytest
import torch

import crbp
from crbp.analysis import follow, late_radius, memory_curve, penalty_curve
from crbp.losses import expected_probability
from crbp.models import PathfinderNet


def _net(steps=3):
    torch.manual_seed(0)
    return PathfinderNet(crbp.cells.HGRU(4, 3, norm_scale=1.0), crbp.Evolve(steps=steps), target_share=0.4)


def _images():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(5, 1, 9, 9, generator=generator), torch.rand(5, 9, 9, generator=generator) > 0.5


def test_each_step_of_a_trajectory_equals_a_run_of_so_many_steps(monkeypatch):
    monkeypatch.setattr("crbp.analysis.trajectory.BATCH", 3)
    net, (image, mask) = _net(), _images()
    found = follow(net, image, mask, steps=4, shown=2)
    for t in range(1, 5):
        with torch.no_grad():
            logits = net(image, steps=t).logits
            residual = [net(one[None], steps=t).run.report.residual for one in image]
        traced = logits.argmax(1).bool()
        f1 = 2 * int((traced & mask).sum()) / int(traced.sum() + mask.sum())
        assert found.f1[t - 1].item() == pytest.approx(f1)
        assert found.residual[t - 1].item() == pytest.approx(sum(residual) / 5, rel=1e-4)
        torch.testing.assert_close(found.probability[t - 1], logits[:2].softmax(1)[:, 1])
    assert found.arrival(3).shape == (2, 9, 9)


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [(0, {}, "no image"), (2, {"shown": 3}, "at most 2, not 3"), (2, {"steps": 0}, "steps")],
)
def test_what_cannot_be_followed_is_refused(images, settings, message):
    image, mask = _images()
    with pytest.raises(ValueError, match=message):
        follow(_net(), image[:images], mask[:images], **{"steps": 2, **settings})


def test_late_radii_are_those_of_the_state_after_so_many_steps(monkeypatch):
    monkeypatch.setattr("crbp.analysis.trajectory.BATCH", 3)
    net, (image, _) = _net(), _images()
    radius, converged = late_radius(net, image, steps=6, seed=2)
    for part in (slice(0, 3), slice(3, 5)):
        with torch.no_grad():
            run = net(image[part], steps=6).run
        wanted = crbp.spectral_radius(run, per_sample=True, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(radius[part], wanted.radius)
        assert converged[part].tolist() == wanted.converged.tolist()


@pytest.mark.parametrize("method", ["direct", "fft"])  # by FFT two images are transformed together
@pytest.mark.parametrize("spoilt", [[1], [0, 3, 4], [0, 1, 2, 3, 4]])
def test_an_image_whose_state_is_not_finite_has_the_radius_inf_and_leaves_the_others_alone(monkeypatch, spoilt, method):
    monkeypatch.setattr("crbp.analysis.trajectory.BATCH", 3)
    net, (image, _) = PathfinderNet(crbp.cells.HGRU(8, 5, norm_scale=1.0), crbp.Evolve(steps=3)), _images()
    net.cell.inhibition.method = net.cell.excitation.method = method
    image[spoilt] = torch.nan
    radius, converged = late_radius(net, image, steps=4)
    assert radius.isinf().tolist() == [k in spoilt for k in range(5)]
    assert not converged[spoilt].any()
    for batch in (range(3), range(3, 5)):
        if others := [k for k in batch if k not in spoilt]:
            wanted = late_radius(net, image[others], steps=4)
            torch.testing.assert_close((radius[others], converged[others]), wanted)


def test_an_evidential_model_is_read_as_its_loss_reads_it():
    net, (image, mask) = _net(), _images()
    found = [follow(net, image, mask, steps=3, shown=2, evidential=sure) for sure in (False, True)]
    with torch.no_grad():
        logits = net(image[:2], steps=3).logits
    torch.testing.assert_close(found[0].probability[-1], logits.softmax(1)[:, 1])
    torch.testing.assert_close(found[1].probability[-1], expected_probability(logits)[:, 1])
    torch.testing.assert_close(found[0].f1, found[1].f1)


def test_the_penalty_of_each_step_is_that_of_a_run_of_so_many_steps(monkeypatch):
    monkeypatch.setattr("crbp.analysis.trajectory.BATCH", 3)
    net, (image, _) = _net(), _images()
    found = penalty_curve(net, image, steps=4, bound=0.1)
    assert found.shape == (4,)
    assert (found > 0).any()
    for t in range(1, 5):
        run = net(image, steps=t).run
        wanted = crbp.lipschitz_penalty(run, bound=0.1, reduction="mean_square")
        torch.testing.assert_close(found[t - 1], wanted.detach())
    with pytest.raises(ValueError, match="no image"):
        penalty_curve(net, image[:0], steps=4)


def test_the_memory_curve_leaves_the_model_as_it_was():
    net = _net()
    before = net.evolve
    image = torch.rand(1, 1, 9, 9)
    flat = memory_curve(net, image, gradient=crbp.RBP(), steps=(2, 5), penalty=crbp.lipschitz_penalty)
    rising = memory_curve(net, image, gradient=crbp.BPTT(), steps=(2, 3, 4))
    assert flat[0] == flat[1]
    assert rising[2] - rising[1] == rising[1] - rising[0] > 0
    assert net.evolve is before
