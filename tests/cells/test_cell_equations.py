"""Each cell against its equations, written out plainly."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crbp.cells import GALAHGRU, HGRU, ConvGRU, ConvLSTM

CHANNELS = 4


def _randomised(cell: nn.Module) -> nn.Module:
    """In float64 and away from its start values, so that no term is hidden by a one or a zero."""
    with torch.no_grad():
        for parameter in cell.double().parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return cell


def _images(batch: int = 3) -> Tensor:
    return torch.randn(batch, CHANNELS, 5, 6, dtype=torch.float64)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution that keeps the image size, as a sum over the places of its kernel."""
    size = weight.shape[-1]
    padded = F.pad(x, [size // 2] * 4)
    out = sum(
        torch.einsum("oc,bchw->bohw", weight[:, :, i, j], padded[:, :, i : i + x.shape[2], j : j + x.shape[3]])
        for i in range(size)
        for j in range(size)
    )
    return out if bias is None else out + bias[:, None, None]


def _normalised(x: Tensor, over: tuple[int, ...], norm: nn.Module) -> Tensor:
    mean = x.mean(over, keepdim=True)
    variance = (x - mean).square().mean(over, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


NORMS = {
    "instance": lambda x, norm: _normalised(x, (2, 3), norm),
    "batch": lambda x, norm: _normalised(x, (0, 2, 3), norm),
    "group": lambda x, norm: _normalised(x, (1, 2, 3), norm),  # one group of up to eight channels
    "none": lambda x, norm: x,
}


def _softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
def test_hgru(norm, training):
    cell = _randomised(HGRU(CHANNELS, 3, norm=norm)).train(training)
    h, x = _images(), _images()
    g1 = _sigmoid(_conv(h, cell.inhibition_gate.weight, cell.inhibition_gate.bias))
    c1 = NORMS[norm](_conv(g1 * h, cell.inhibition.weight), cell.inhibition_norm)
    z = _softplus(x - _softplus(c1 * (cell.alpha * h + cell.mu)))
    g2 = _sigmoid(_conv(z, cell.update_gate.weight, cell.update_gate.bias))
    c2 = NORMS[norm](_conv(z, cell.excitation.weight), cell.excitation_norm)
    candidate = _softplus(cell.kappa * z + cell.gamma * c2 + cell.omega * z * c2)
    wanted = _softplus((1 - g2) * h + g2 * candidate)
    torch.testing.assert_close(cell(h, x), wanted, rtol=1e-12, atol=1e-12)


def test_convlstm():
    cell = _randomised(ConvLSTM(CHANNELS, 3))
    (h, c), x = (_images(), _images()), _images()
    gates = _conv(torch.cat([x, h], dim=1), cell.gates.weight, cell.gates.bias)
    i, f, o, a = gates.split(CHANNELS, dim=1)
    memory = _sigmoid(f) * c + _sigmoid(i) * torch.tanh(a)
    wanted = _sigmoid(o) * torch.tanh(memory), memory
    torch.testing.assert_close(cell((h, c), x), wanted, rtol=1e-12, atol=1e-12)
    assert cell.readout_of((h, c)) is h


def test_convgru():
    cell = _randomised(ConvGRU(CHANNELS, 3))
    h, x = _images(), _images()
    gates = _sigmoid(_conv(torch.cat([x, h], dim=1), cell.gates.weight, cell.gates.bias))
    r, u = gates.split(CHANNELS, dim=1)
    candidate = torch.tanh(_conv(torch.cat([x, r * h], dim=1), cell.candidate.weight, cell.candidate.bias))
    torch.testing.assert_close(cell(h, x), (1 - u) * h + u * candidate, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_galahgru(groups):
    cell = _randomised(GALAHGRU(CHANNELS, 3, groups=groups))
    h, x = _images(), _images()

    def norm(image: Tensor, layer: nn.Module) -> Tensor:
        grouped = image.unflatten(1, (groups, CHANNELS // groups))
        mean = grouped.mean((2, 3, 4), keepdim=True)
        variance = (grouped - mean).square().mean((2, 3, 4), keepdim=True)
        white = ((grouped - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
        return white * layer.weight[:, None, None] + layer.bias[:, None, None]

    squeezed = _softplus(_conv(h, cell.channel_squeeze.weight, cell.channel_squeeze.bias))
    channel = _conv(squeezed, cell.channel_expand.weight)
    squeezed = _softplus(_conv(h, cell.spatial_squeeze.weight, cell.spatial_squeeze.bias))
    spatial = _conv(squeezed, cell.spatial_map.weight)
    assert channel.shape == h.shape
    assert spatial.shape == (3, 1, 5, 6)
    g1 = _sigmoid(channel * spatial + cell.attention_bias)
    c1 = norm(_conv(h * g1, cell.inhibition.weight), cell.inhibition_norm)
    z = _softplus(x - c1 * (cell.alpha * h + cell.mu))
    g2 = _sigmoid(_conv(z, cell.update_gate.weight, cell.update_gate.bias))
    candidate = _softplus(norm(_conv(z, cell.excitation.weight), cell.excitation_norm))
    torch.testing.assert_close(cell(h, x), (1 - g2) * h + g2 * candidate, rtol=1e-12, atol=1e-12)
    assert cell.readout_of(h) is h


CELLS = {
    "hgru": lambda: HGRU(CHANNELS, 3),
    "hgru-group": lambda: HGRU(CHANNELS, 3, norm="group"),
    "hgru-none": lambda: HGRU(CHANNELS, 3, norm="none"),
    "galahgru": lambda: GALAHGRU(CHANNELS, 3, groups=2),
    "convlstm": lambda: ConvLSTM(CHANNELS, 3),
    "convgru": lambda: ConvGRU(CHANNELS, 3),
}


def _after(cell: nn.Module, drive: Tensor, steps: int = 3) -> Tensor:
    state = cell.initial_state(drive)
    for _ in range(steps):
        state = cell(state, drive)
    return cell.readout_of(state)


@pytest.mark.parametrize("name", CELLS)
def test_an_image_does_not_know_the_rest_of_its_batch(name):
    cell, drive = CELLS[name]().double(), _images()
    together = _after(cell, drive)
    for i in range(len(drive)):
        torch.testing.assert_close(together[i : i + 1], _after(cell, drive[i : i + 1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_norm_couples_the_images_of_a_batch(training):
    cell, drive = HGRU(CHANNELS, 3, norm="batch").double().train(training), _images()
    assert (_after(cell, drive)[:1] - _after(cell, drive[:1])).abs().max() > 1e-3


@pytest.mark.parametrize("name", CELLS)
def test_initial_state_is_zero_and_like_the_drive(name):
    cell, drive = CELLS[name](), torch.randn(2, CHANNELS, 5, 5).bfloat16()
    state = cell.initial_state(drive)
    for leaf in state if isinstance(state, tuple) else (state,):
        assert torch.equal(leaf, torch.zeros_like(drive))
        assert leaf.dtype == drive.dtype
