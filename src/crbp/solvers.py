"""Solvers of the backward equation ``(I − Jᵀ) u = g`` that need nothing but vector-Jacobian products."""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crbp._checks import count, non_negative

VJP = Callable[[Tensor], Tensor]


class StopReason(enum.StrEnum):
    """Why an iteration ended."""

    BUDGET = "budget"
    """The allowed number of steps or terms was used up."""
    CONVERGED = "converged"
    """The relative tolerance was reached."""
    DIVERGED = "diverged"
    """The relative residual at the end was above the accepted one."""
    NOT_FINITE = "not finite"
    """A NaN or an infinity appeared."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What a solver found.

    Attributes:
        solution: the last iterate, of the shape of ``g``.
        best: the iterate with the smallest relative residual; ``g`` itself where no iterate was better.
        terms: vector-Jacobian products spent.
        residual: relative residual, in units of ``‖g‖`` (each solver says of which iterate).
        stop: why the iteration ended.
    """

    solution: Tensor
    best: Tensor
    terms: int
    residual: float
    stop: StopReason


class Solver(ABC):
    """Finds ``u`` with ``(I − Jᵀ) u = g``; every test is relative to ``‖g‖``."""

    @abstractmethod
    def solve(self, vjp: VJP, g: Tensor) -> Solution:
        """Solve for the gradient ``g`` given the map ``vjp: v ↦ Jᵀ v``; both keep the shape of ``g``."""


def _norm(tensor: Tensor) -> float:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norm = float(torch.linalg.vector_norm(tensor, dtype=wide))
    if norm > 0 and math.isfinite(norm):
        return norm
    # The squares may have left the range of the dtype where the norm has not: measure in units of the largest entry.
    peak = float(torch.linalg.vector_norm(tensor, ord=math.inf, dtype=wide))
    if peak == 0 or not math.isfinite(peak):
        return peak
    return peak * float(torch.linalg.vector_norm(tensor.to(wide) / peak))


def _trivial(g: Tensor, scale: float) -> Solution | None:
    """The answer where there is nothing to solve: a zero gradient, or one that is not finite (passed on as it is)."""
    if scale == 0:
        return Solution(solution=g, best=g, terms=0, residual=0.0, stop=StopReason.CONVERGED)
    if not math.isfinite(scale):
        return Solution(solution=g, best=g, terms=0, residual=math.nan, stop=StopReason.NOT_FINITE)
    return None


@dataclass(frozen=True, kw_only=True)
class Neumann(Solver):
    """The truncated Neumann series ``u = Σ_{k=0..terms} (Jᵀ)ᵏ g``, one vector-Jacobian product a term.

    It misses exactly ``(Jᵀ)^{terms+1} u*`` of the solution ``u*``. The residual reported is the size of the last term,
    ``‖(Jᵀ)^K g‖ / ‖g‖``: the residual of the sum without that term, known at no extra cost.

    Args:
        terms: terms beyond the first, at least 0 (0 is the one-step gradient ``u = g``).
        tolerance: stop once a term is at most this share of ``‖g‖``; 0 takes every term.

    Raises:
        ValueError: for a negative number of terms or tolerance.

    Source: Liao et al., Reviving and improving recurrent back-propagation, ICML 2018.
    """

    terms: int = 15
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        count("terms", self.terms, at_least=0)
        non_negative("tolerance", self.tolerance)

    def solve(self, vjp: VJP, g: Tensor) -> Solution:
        """Sum the series; see the class."""
        scale = _norm(g)
        if (trivial := _trivial(g, scale)) is not None:
            return trivial
        total = term = best = g
        residual = smallest = 1.0
        taken, stop = 0, StopReason.BUDGET
        while taken < self.terms:
            term = vjp(term)
            taken += 1
            residual = _norm(term) / scale
            # This is the residual of the sum so far; the term is added to it all the same.
            if residual < smallest:
                smallest, best = residual, total
            total = total + term
            if not math.isfinite(residual):
                stop = StopReason.NOT_FINITE
                break
            if residual <= self.tolerance:
                stop = StopReason.CONVERGED
                break
        return Solution(solution=total, best=best, terms=taken, residual=residual, stop=stop)


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration of the fixed-point iteration ``u ← g + Jᵀ u``.

    The next iterate mixes the last ``memory`` ones with the weights that minimise their residual. Needs ``2 memory``
    vectors. The residual reported is ``‖g − (I − Jᵀ) u‖ / ‖g‖`` of the best iterate, which is the solution returned.

    Args:
        terms: the most vector-Jacobian products, at least 1.
        memory: iterates mixed, at least 1 (1 is the plain iteration, the Neumann series).
        tolerance: relative residual at which to stop.

    Raises:
        ValueError: for a budget or memory below 1 or a negative tolerance.

    Source: Walker and Ni, Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal. 2011.
    """

    terms: int = 15
    memory: int = 5
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        count("terms", self.terms)
        count("memory", self.memory)
        non_negative("tolerance", self.tolerance)

    def solve(self, vjp: VJP, g: Tensor) -> Solution:
        """Iterate; see the class."""
        scale = _norm(g)
        if (trivial := _trivial(g, scale)) is not None:
            return trivial
        u = best = g
        smallest, taken, stop = math.inf, 0, StopReason.BUDGET
        images: list[Tensor] = []
        residuals: list[Tensor] = []
        while taken < self.terms:
            image = g + vjp(u)
            taken += 1
            residual = _norm(image - u) / scale
            if not math.isfinite(residual):
                stop = StopReason.NOT_FINITE
                break
            if residual < smallest:
                smallest, best = residual, u
            if residual <= self.tolerance:
                stop = StopReason.CONVERGED
                break
            images = [*images, image][-self.memory :]
            residuals = [*residuals, image - u][-self.memory :]
            u = _mix(images, residuals)
        return Solution(solution=best, best=best, terms=taken, residual=smallest, stop=stop)


def _mix(images: list[Tensor], residuals: list[Tensor]) -> Tensor:
    """``Σ wᵢ imageᵢ`` with ``Σ wᵢ = 1`` minimising ``‖Σ wᵢ residualᵢ‖``, by least squares on the differences."""
    newest = images[-1]
    if len(images) == 1:
        return newest
    wide = torch.promote_types(newest.dtype, torch.float32)
    last = residuals[-1].flatten().to(wide)
    steps = torch.stack([r.flatten().to(wide) for r in residuals[:-1]], dim=1) - last[:, None]
    # QR and a pseudo-inverse: iterates that have become linearly dependent get no weight instead of a crash.
    basis, triangle = torch.linalg.qr(steps)
    weights = -torch.linalg.pinv(triangle) @ (basis.T @ last)
    for weight, image in zip(weights.unbind(), images[:-1], strict=True):
        newest = newest + (weight * (image - images[-1]).to(wide)).to(newest.dtype)
    return newest


@dataclass(frozen=True, kw_only=True)
class GMRES(Solver):
    """Generalised minimal residuals: the best ``u`` in the Krylov space that the vector-Jacobian products span.

    Needs ``terms + 1`` vectors. The residual reported is ``‖g − (I − Jᵀ) u‖ / ‖g‖``, from the Arnoldi relation.

    Args:
        terms: the most vector-Jacobian products, at least 1.
        tolerance: relative residual at which to stop.

    Raises:
        ValueError: for a budget below 1 or a negative tolerance.

    Source: Saad and Schultz, GMRES, SIAM J. Sci. Stat. Comput. 1986.
    """

    terms: int = 15
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        count("terms", self.terms)
        non_negative("tolerance", self.tolerance)

    def solve(self, vjp: VJP, g: Tensor) -> Solution:
        """Build the Krylov space and solve the small least-squares problem; see the class."""
        scale = _norm(g)
        if (trivial := _trivial(g, scale)) is not None:
            return trivial
        krylov = _Krylov(g, scale)
        stop = StopReason.BUDGET
        residual = 1.0
        while krylov.size < self.terms:
            if not krylov.grow(vjp):
                stop = StopReason.NOT_FINITE
                break
            residual = krylov.solve()
            if residual <= self.tolerance or krylov.exhausted:
                rounding = 100 * torch.finfo(krylov.basis[0].dtype).eps
                stop = StopReason.CONVERGED if residual <= max(self.tolerance, rounding) else StopReason.BUDGET
                break
        solution = krylov.combine() if krylov.weights.numel() else g
        spent = krylov.size + (stop is StopReason.NOT_FINITE)
        return Solution(solution=solution, best=solution, terms=spent, residual=residual, stop=stop)


@dataclass
class _Krylov:
    """Arnoldi basis of ``span{g, (I − Jᵀ) g, …}`` and the small problem on it."""

    g: Tensor
    scale: float
    basis: list[Tensor] = field(init=False)
    columns: list[Tensor] = field(default_factory=list)
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    exhausted: bool = False

    def __post_init__(self) -> None:
        wide = torch.promote_types(self.g.dtype, torch.float32)
        self.basis = [self.g.flatten().to(wide) / self.scale]

    @property
    def size(self) -> int:
        return len(self.columns)

    def grow(self, vjp: VJP) -> bool:
        """Add one basis vector; False if it is not finite."""
        newest = self.basis[-1]
        image = vjp(newest.view(self.g.shape).to(self.g.dtype)).flatten().to(newest.dtype)
        vector = newest - image
        before = _norm(vector)
        if not math.isfinite(before):
            return False
        stacked = torch.stack(self.basis)
        column = stacked @ vector
        vector = vector - stacked.T @ column
        # A second pass keeps the basis orthogonal to rounding.
        correction = stacked @ vector
        vector = vector - stacked.T @ correction
        length = torch.linalg.vector_norm(vector)
        weights = torch.cat([column + correction, length[None]])
        # Their squares can leave the range of numbers where the vector itself has not.
        if not bool(weights.isfinite().all()):
            return False
        self.columns.append(weights)
        self.exhausted = float(length) <= before * torch.finfo(vector.dtype).eps * 10
        self.basis.append(vector / length if not self.exhausted else torch.zeros_like(vector))
        return True

    def solve(self) -> float:
        """Weights of the basis that minimise the residual; returns it relative to ``‖g‖``."""
        size = self.size
        hessenberg = self.basis[0].new_zeros(size + 1, size, device="cpu")
        for j, column in enumerate(self.columns):
            hessenberg[: j + 2, j] = column.cpu()
        target = hessenberg.new_zeros(size + 1, 1)
        target[0] = 1
        self.weights = torch.linalg.lstsq(hessenberg, target, driver="gelsd").solution[:, 0]
        return float(torch.linalg.vector_norm(target[:, 0] - hessenberg @ self.weights))

    def combine(self) -> Tensor:
        """The solution in the shape and dtype of ``g``."""
        weights = self.weights.to(self.basis[0].device)
        stacked = torch.stack(self.basis[: len(weights)], dim=1)
        return (self.scale * (stacked @ weights)).view(self.g.shape).to(self.g.dtype)
