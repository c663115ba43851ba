"""How the cells start, and which arguments they refuse."""

import math

import pytest
import torch

from crbp.cells import GALAHGRU, HGRU, ConvGRU, ConvLSTM
from crbp.cells._parts import chronos_, make_norm

HORIZON = 20
MANY = 64  # channels, so that a range is filled


def _assert_chronos(bias: torch.Tensor) -> None:
    """``log U(1, T − 1)``: within its range, not constant, and uniform once the logarithm is undone."""
    times = bias.detach().exp()
    assert times.min() >= 1 - 1e-5
    assert times.max() <= (HORIZON - 1) * (1 + 1e-5)
    # The largest gap of the empirical distribution, against the Kolmogorov–Smirnov bound at 1e-6.
    expected = (times.sort().values - 1) / (HORIZON - 2)
    gap = (expected - (torch.arange(len(times)) + 0.5) / len(times)).abs().max()
    assert gap < math.sqrt(math.log(2 / 1e-6) / 2 / len(times)) + 0.5 / len(times)


def test_chronos_fills_in_place():
    bias = torch.full((MANY,), 7.0)
    assert chronos_(bias, HORIZON) is bias
    _assert_chronos(bias)


def test_hgru_starts_its_gates_against_each_other():
    cell = HGRU(MANY, 1, horizon=HORIZON)
    _assert_chronos(cell.inhibition_gate.bias)
    assert torch.equal(cell.update_gate.bias, -cell.inhibition_gate.bias)


def test_galahgru_starts_from_the_paper():
    cell = GALAHGRU(MANY, 3, horizon=HORIZON)
    _assert_chronos(cell.attention_bias.flatten())
    assert torch.equal(cell.update_gate.bias, -cell.attention_bias.flatten())
    assert torch.equal(cell.alpha, torch.full((MANY, 1, 1), 0.1))
    assert torch.equal(cell.mu, torch.ones(MANY, 1, 1))
    for norm in (cell.inhibition_norm, cell.excitation_norm):
        assert norm.num_groups == 32
        assert torch.equal(norm.weight, torch.full((MANY,), 0.1))
        assert not norm.bias.any()
    for conv in (cell.inhibition, cell.excitation, cell.channel_expand, cell.spatial_squeeze, cell.update_gate):
        expected = math.sqrt(2 / conv.weight[0].numel())  # Kaiming's, by the number of inputs
        assert abs(float(conv.weight.detach().std()) / expected - 1) < 0.1
    assert not cell.channel_squeeze.bias.any()
    assert not cell.spatial_squeeze.bias.any()
    assert torch.equal(GALAHGRU(32, norm_scale=1.0).excitation_norm.weight, torch.ones(32))


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        ((30,), {"groups": 5}, "multiple of 4 and of groups=5, not 30"),
        ((20,), {}, "multiple of 4 and of groups=32, not 20"),
        ((32,), {"groups": 0}, "groups .* not 0"),
        ((32, 4), {}, "kernel_size must be odd.* not 4"),
        ((32,), {"horizon": 2}, "horizon .* not 2"),
    ],
)
def test_bad_sizes_of_galahgru_are_named(arguments, options, named):
    with pytest.raises(ValueError, match=named):
        GALAHGRU(*arguments, **options)


def test_convlstm_starts_to_remember():
    entry, forget, output, new = ConvLSTM(MANY, 1, horizon=HORIZON).gates.bias.chunk(4)
    _assert_chronos(forget)
    assert torch.equal(entry, -forget)
    assert not output.any()
    assert not new.any()


def test_convgru_starts_to_remember():
    cell = ConvGRU(MANY, 1, horizon=HORIZON)
    reset, update = cell.gates.bias.chunk(2)
    _assert_chronos(-update)
    assert not reset.any()
    assert not cell.candidate.bias.any()


def test_hgru_starts_from_the_paper():
    cell = HGRU(5, 3)
    for name, value in {"alpha": 0.1, "mu": 1.0, "kappa": 0.5, "gamma": 1.0, "omega": 0.5}.items():
        assert torch.equal(getattr(cell, name), torch.full((5, 1, 1), value))
    for norm in (cell.inhibition_norm, cell.excitation_norm):
        assert torch.equal(norm.weight, torch.full((5,), 0.1))
        assert not norm.bias.any()
    assert torch.equal(HGRU(5, 3, norm_scale=1.0).excitation_norm.weight, torch.ones(5))


@pytest.mark.parametrize(
    "conv",
    [
        *[getattr(HGRU(5, 3), name) for name in ("inhibition", "excitation", "inhibition_gate", "update_gate")],
        ConvLSTM(5, 3).gates,
        ConvGRU(5, 3).gates,
        ConvGRU(5, 3).candidate,
    ],
)
def test_kernels_start_orthogonal(conv):
    rows = conv.weight.detach().double().flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cell", [HGRU, ConvLSTM, ConvGRU])
@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        ((0, 3), {}, "channels .* not 0"),
        ((2.0, 3), {}, "channels .* not 2.0"),
        ((2, 4), {}, "kernel_size must be odd.* not 4"),
        ((2, 0), {}, "kernel_size .* not 0"),
        ((2, -3), {}, "kernel_size .* not -3"),
        ((2, 3), {"horizon": 2}, "horizon .* at least 3, not 2"),
        ((2, 3), {"horizon": 20.0}, "horizon .* not 20.0"),
    ],
)
def test_bad_sizes_are_named(cell, arguments, options, named):
    with pytest.raises(ValueError, match=named):
        cell(*arguments, **options)


def test_unknown_norms_are_named():
    for refused in (lambda: HGRU(2, 3, norm="layer"), lambda: make_norm("layer", 2)):
        with pytest.raises(ValueError, match="one of 'instance', 'batch', 'group', 'none', not 'layer'"):
            refused()


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (7, 1), (8, 1), (16, 2), (25, 1), (30, 3), (32, 4), (64, 8)])
def test_groups_divide_the_channels(channels, groups):
    norm = make_norm("group", channels)
    assert norm.num_groups == groups
    assert channels % groups == 0


@pytest.mark.parametrize("cell", [HGRU, ConvLSTM, ConvGRU])
def test_wrong_shapes_are_named(cell):
    cell = cell(2, 3)
    drive = torch.zeros(1, 2, 5, 5)
    state = cell.initial_state(drive)
    for wrong in (torch.zeros(1, 3, 5, 5), torch.zeros(2, 5, 5), torch.zeros(1, 2, 5, 6), torch.zeros(2, 2, 5, 5)):
        with pytest.raises(ValueError, match=r"must both have shape \(B, 2, H, W\)"):
            cell(state, wrong)


def test_the_memory_of_a_convlstm_is_checked_too():
    cell, drive = ConvLSTM(2, 3), torch.zeros(1, 2, 5, 5)
    with pytest.raises(ValueError, match="must both have shape"):
        cell((torch.zeros_like(drive), torch.zeros(1, 2, 5, 4)), drive)
