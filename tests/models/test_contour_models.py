"""The contour-tracing model and its feed-forward baseline."""

import math

import pytest
import torch
from torch import Tensor, nn

import crbp
from crbp import BPTT, RBP, Evolve, Neumann
from crbp.cells import HGRU, ConvGRU, ConvLSTM
from crbp.models import FeedForwardNet, PathfinderNet
from crbp.models.pathfinder import gabor_bank


def _net(gradient: crbp.GradientMethod | None = None, steps: int = 3, cell: nn.Module | None = None) -> PathfinderNet:
    return PathfinderNet(cell or HGRU(4, 3), Evolve(steps=steps, gradient=gradient or BPTT())).double()


def _images(batch: int = 2) -> Tensor:
    return torch.rand(batch, 1, 9, 10, dtype=torch.float64)


def test_parameter_counts_of_the_paper():
    def count(model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    evolve = Evolve(steps=20)
    assert count(PathfinderNet(HGRU(25, 15, norm="batch"), evolve, norm="batch")) == 284_127
    assert count(PathfinderNet(ConvLSTM(25, 15), evolve, norm="batch")) == 1_126_452
    assert count(FeedForwardNet(25, 15, norm="batch")) == 845_527


# The filters


@pytest.mark.parametrize(("filters", "size"), [(25, 7), (8, 7), (1, 5), (6, 9)])
def test_gabor_filters_have_no_mean_and_unit_norm(filters, size):
    bank = gabor_bank(filters, size).double()
    assert bank.shape == (filters, 1, size, size)
    torch.testing.assert_close(bank.mean((1, 2, 3)), torch.zeros(filters).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(bank.square().sum((1, 2, 3)), torch.ones(filters).double(), rtol=0, atol=1e-6)
    assert len(bank.flatten(1).unique(dim=0)) == filters


def test_gabor_filters_come_in_even_and_odd_pairs():
    bank = gabor_bank(8)
    turned = bank.flip(2, 3)
    torch.testing.assert_close(turned[0::2], bank[0::2])
    torch.testing.assert_close(turned[1::2], -bank[1::2])


def test_gabor_filters_prefer_their_orientation():
    """Of gratings at the orientations of the bank, the energy of each pair is largest for its own."""
    pairs, size, wavelength = 6, 15, 4.0
    bank = gabor_bank(2 * pairs, size, wavelength=wavelength)[:, 0]
    y, x = torch.meshgrid(torch.arange(size) - 7.0, torch.arange(size) - 7.0, indexing="ij")
    for own in range(pairs):
        angle = math.pi * own / pairs
        grating = torch.cos(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / wavelength)
        energy = (bank * grating).sum((1, 2)).square().view(pairs, 2).sum(1)
        assert int(energy.argmax()) == own


def test_the_model_starts_from_the_bank():
    net = PathfinderNet(HGRU(6, 3), Evolve(steps=1))
    assert torch.equal(net.filters.weight, gabor_bank(6))
    assert not net.filters.bias.any()


# The forward pass


@pytest.mark.parametrize("cell", [HGRU, ConvLSTM, ConvGRU])
def test_the_whole_path_in_plain_steps(cell):
    net, image = _net(cell=cell(4, 3)), _images()
    drive = net.filters(image) ** 2
    state = net.cell.initial_state(drive)
    for _ in range(3):
        state = net.cell(state, drive)
    wanted = net.readout(net.readout_norm(state[0] if isinstance(state, tuple) else state))
    prediction = net(image)
    assert torch.equal(prediction.logits, wanted)
    assert prediction.logits.shape == (2, 2, 9, 10)
    assert prediction.run.report.steps == 3
    assert prediction.steps is None


def test_steps_may_be_asked_for():
    net, image = _net(steps=3), _images()
    for steps in (1, 3, 8):
        prediction = net(image, steps=steps)
        longer = _net(steps=steps)
        longer.load_state_dict(net.state_dict())
        assert torch.equal(prediction.logits, longer(image).logits)
        assert prediction.run.report.steps == steps
    assert net.evolve.steps == 3
    with pytest.raises(ValueError, match=r"steps .* not 0"):
        net(image, steps=0)


@pytest.mark.parametrize("gradient", [BPTT(), RBP(Neumann(terms=3)), crbp.CheckpointedBPTT(chunk=2)])
def test_logits_of_every_step(gradient):
    net, image = _net(gradient, steps=5), _images()
    prediction = net(image, every_step=True)
    assert prediction.steps.shape == (5, 2, 2, 9, 10)
    assert torch.equal(prediction.steps[-1], prediction.logits)
    for t in range(5):
        assert torch.equal(prediction.steps[t], net(image, steps=t + 1).logits)


@pytest.mark.parametrize("gradient", [BPTT(), crbp.CheckpointedBPTT(chunk=2)])
def test_a_loss_at_every_step_is_back_propagated_through_all(gradient):
    net, image = _net(gradient, steps=4), _images()
    weights = torch.randn(4, 2, 2, 9, 10, dtype=torch.float64)
    got = torch.autograd.grad((net(image, every_step=True).steps * weights).sum(), list(net.parameters()))
    drive = net.drive(image)
    state, loss = net.cell.initial_state(drive), 0
    for weight in weights:
        state = net.cell(state, drive)
        loss = loss + (net.read(state) * weight).sum()
    wanted = torch.autograd.grad(loss, list(net.parameters()))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_every_parameter_is_reached_by_rbp_with_a_penalty():
    net = _net(RBP(Neumann(terms=3)))
    prediction = net(_images())
    (prediction.logits.square().mean() + crbp.lipschitz_penalty(prediction.run, bound=0.1)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_images_do_not_know_the_rest_of_their_batch():
    net, image = _net(), _images(3)
    torch.testing.assert_close(net(image).logits[1:2], net(image[1:2]).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("share", [0.01, 0.3])
@pytest.mark.parametrize("build", ["recurrent", "feedforward"])
def test_the_readout_starts_from_the_share_of_the_target(build, share):
    if build == "recurrent":
        net = PathfinderNet(HGRU(4, 3), Evolve(steps=2), target_share=share)
    else:
        net = FeedForwardNet(4, 3, depth=2, target_share=share)
    with torch.no_grad():
        net.readout.weight.zero_()
    probability = net(torch.rand(2, 1, 8, 8)).logits.softmax(1)[:, 1]
    torch.testing.assert_close(probability, torch.full((2, 8, 8), share))


# The baseline


def test_feed_forward_layers_in_plain_code():
    net, image = FeedForwardNet(4, 3, depth=2).double(), _images()
    x = nn.functional.instance_norm(nn.functional.conv2d(image, net.layers[0].weight, padding=3))
    for conv in (net.layers[2], net.layers[5]):
        x = nn.functional.instance_norm(nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)).relu()
    prediction = net(image)
    torch.testing.assert_close(prediction.logits, net.readout(x), rtol=1e-12, atol=1e-12)
    assert prediction.run is None
    assert prediction.steps is None


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: FeedForwardNet(4, 3, depth=0), "depth .* not 0"),
        (lambda: FeedForwardNet(4, 2), "kernel_size must be odd.* not 2"),
        (lambda: FeedForwardNet(4, 3, norm="layer"), "not 'layer'"),
        (lambda: FeedForwardNet(4, 3, target_share=1.0), "target_share .* not 1.0"),
        (lambda: PathfinderNet(HGRU(4, 3), Evolve(steps=1), target_share=0.0), "target_share .* not 0.0"),
        (lambda: PathfinderNet(HGRU(4, 3), Evolve(steps=1), norm="layer"), "not 'layer'"),
    ],
)
def test_bad_values_are_named(build, named):
    with pytest.raises(ValueError, match=named):
        build()
