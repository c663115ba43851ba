"""Penalties that keep the dynamics contractive. Each is about one step: memory O(1)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from crbp._checks import choice, count, share
from crbp.evolve import Run

Reduction = Literal["norm", "mean_square", "sum_square"]


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
