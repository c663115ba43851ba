"""Penalties that keep the dynamics contractive. Each is about one step: memory O(1)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from crbp._checks import choice, count, share
from crbp._tree import Leaves
from crbp.errors import StateError
from crbp.evolve import Run
from crbp.ops._kept import passing

Reduction = Literal["norm", "mean_square", "sum_square"]


@passing()
def lipschitz_penalty(run: Run, *, bound: float = 0.9, reduction: Reduction = "norm") -> Tensor:
    """Lipschitz coefficient penalty (LCP) on the last step of a run.

    ``‖ (1ᵀJ − λ)⁺ ‖₂`` with ``J = ∂f/∂h`` at ``h_{N−1}`` and λ the ``bound``. ``1ᵀJ`` are the column sums of the
    Jacobian, one vector-Jacobian product. Columns can cancel, so a penalty of zero is no proof of contraction: see
    `crbp.spectral_radius`. Under `BPTT` its gradient flows through all steps, under `RBP` through the last one. Where
    no gradient is recorded (``torch.no_grad``) only its value is returned.

    Args:
        run: what `crbp.Evolve` returned, before its graph is freed by ``backward()``.
        bound: λ in [0, 1), the share by which a change of the state may persist.
        reduction: over all units of all images: ``"norm"``, the Euclidean norm of the paper; ``"mean_square"`` and
            ``"sum_square"``, the squares that its code uses for contour tracing and for panoptic segmentation.

    Returns:
        A scalar.

    Raises:
        ValueError: if the bound lies outside [0, 1) or the reduction is unknown.

    Source: Linsley et al., Stable and expressive recurrent vision models, NeurIPS 2020, eq. 10.
    """
    share("bound", bound)
    choice("reduction", reduction, get_args(Reduction))
    state, vjp = run.linearized()
    columns = vjp(tuple(leaf.new_ones(()).expand_as(leaf) for leaf in state))
    # Not joined into one tensor: autograd would save the copy beside the columns.
    excess = [(column - bound).relu() for column in columns]
    if reduction == "norm":
        # Of norms and not the root of a sum, whose derivative at zero is not finite.
        norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in excess]))
        return norm
    total = torch.stack([each.square().sum() for each in excess]).sum()
    return total / sum(each.numel() for each in excess) if reduction == "mean_square" else total


def residual_penalty(run: Run) -> Tensor:
    """Squared relative residual of the last step, ``‖f(h_{N−1}) − h_{N−1}‖² / ‖h_N‖²``.

    The denominator is held fixed. Under `BPTT` the gradient flows through all steps, under `RBP` through the last one,
    which is asked to stay where it is. A state that keeps moving shows in it even where the columns that
    `lipschitz_penalty` sums cancel; it needs no second derivative.

    Args:
        run: what `crbp.Evolve` returned, before its graph is freed by ``backward()``.

    Returns:
        A scalar, the square of ``run.report.residual``.

    Source: the residual that equilibrium models minimise, Bai et al., Deep equilibrium models, NeurIPS 2019; as a
    penalty on training, docs/stability.md.
    """
    before, after = run.last_step()
    wide = [torch.promote_types(leaf.dtype, torch.float32) for leaf in after]
    moved = torch.stack(
        [(new - old).to(kind).square().sum() for old, new, kind in zip(before, after, wide, strict=True)]
    ).sum()
    scale = torch.stack([new.detach().to(kind).square().sum() for new, kind in zip(after, wide, strict=True)]).sum()
    # A state that has just become zero moved by all it was.
    scale = torch.where(scale > 0, scale, moved.detach())
    return moved / torch.where(scale > 0, scale, 1.0)


@passing()
def spectral_penalty(run: Run, *, bound: float = 0.95, iterations: int = 2) -> Tensor:
    """Growth of what still moves in the last step of a run, beyond a bound: a spectral estimate, sample by sample.

    ``mean_b ((‖Jᵀ v_b‖ − λ)⁺)²`` with ``J = ∂f/∂h`` at ``h_{N−1}``, λ the ``bound`` and ``v_b`` the unit vector that
    ``iterations`` steps of power iteration, ``v ← Jᵀ v / ‖Jᵀ v‖``, reach from the move of the last step,
    ``h_N − h_{N−1}``, of sample b. N steps of the run have already turned that towards what contracts least, so that
    a mode of few units, which neither column sums nor random vectors show, is found. Under `BPTT` its gradient flows
    through all steps, under `RBP` through the last one; ``v`` is held fixed.

    Args:
        run: what `crbp.Evolve` returned, before its graph is freed by ``backward()``. The first dimension of its state
            is that of the samples.
        bound: λ in [0, 1), the growth that costs nothing.
        iterations: of the power iteration, one vector-Jacobian product each; one more is for the penalty.

    Returns:
        A scalar; zero where nothing moves.

    Raises:
        ValueError: for values out of range.
        StateError: if the tensors of the state have no first dimension in common.

    Source: docs/stability.md; of one Jacobian's spectral radius, `crbp.spectral_radius`.
    """
    share("bound", bound)
    count("iterations", iterations, at_least=0)
    _, vjp = run.linearized()
    before, after = run.last_step()
    shapes = [tuple(leaf.shape) for leaf in after]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        raise StateError(
            f"the tensors of the state need one first dimension, that of the samples, not shapes {shapes}; leave the "
            "spectral penalty out (spectral_weight=0) where a state has none"
        )
    with torch.no_grad():
        vector = _unit(tuple(new - old for old, new in zip(before, after, strict=True)))
        for _ in range(iterations):
            vector = _unit(vjp(vector))
    return (_lengths(vjp(vector)) - bound).relu().square().mean()


def _lengths(leaves: Leaves) -> Tensor:
    """Euclidean norm of each sample over all leaves, ``(B,)``."""
    wide = [leaf.to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in leaves]
    # Of norms and not the root of a sum, whose derivative at zero is not finite.
    each = [torch.linalg.vector_norm(leaf.reshape(len(leaf), -1), dim=1) for leaf in wide]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(each), dim=0)
    return norms


def _unit(leaves: Leaves) -> Leaves:
    """Every sample divided by its norm over all leaves; one of zeros stays."""
    lengths = _lengths(leaves)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    return tuple(leaf / lengths.view(-1, *[1] * (leaf.ndim - 1)).to(leaf.dtype) for leaf in leaves)


@passing()
def jacobian_frobenius_penalty(run: Run, *, samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """Squared Frobenius norm of the last step's Jacobian per state unit, by Hutchinson's estimator.

    ``‖J‖²_F / d = E ‖Jᵀ v‖² / d`` for standard normal ``v`` and a state of ``d`` numbers. Since the spectral radius is
    at most ``‖J‖_F``, it restrains every direction, also those in which the columns that `lipschitz_penalty` sums
    cancel.

    Args:
        run: what `crbp.Evolve` returned, before its graph is freed by ``backward()``.
        samples: random vectors averaged over, one vector-Jacobian product each.
        generator: of the random vectors, on the device of the state; None draws from torch's own.

    Returns:
        A scalar.

    Raises:
        ValueError: if ``samples`` is below 1.

    Source: Bai et al., Stabilizing equilibrium models by Jacobian regularization, arXiv 2106.14342.
    """
    count("samples", samples)
    state, vjp = run.linearized()
    units = sum(leaf.numel() for leaf in state)
    total = state[0].new_zeros(())
    for _ in range(samples):
        vector = tuple(
            torch.randn(leaf.shape, dtype=leaf.dtype, device=leaf.device, generator=generator) for leaf in state
        )
        total = total + sum((product.square().sum() for product in vjp(vector)), total.new_zeros(()))
    return total / (samples * units)
