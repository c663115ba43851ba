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
        """Solve for the gradient ``g`` given the map ``vjp: v ↦ Jᵀ v``; both keep the shape of ``g``.

        No gradient flows through the solution.
        """


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


def _uncast(device: torch.device) -> torch.autocast:
    """Without autocast, under which a product of vectors would be taken in a lower precision."""
    return torch.autocast(device.type, enabled=False)


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
    ``‖(Jᵀ)^K g‖ / ‖g‖``: the residual of the sum without that term, known at no extra cost. Holds up to 4 vectors
    beside ``g``: the sum, the best one, the term and the next.

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
        total = term = best = g.detach()
        residual = smallest = 1.0
        taken, stop = 0, StopReason.BUDGET
        while taken < self.terms:
            term = vjp(term).detach()
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

    The next iterate mixes the last ``memory`` ones with the weights that minimise their residual. Holds up to
    ``2 memory + 3`` vectors beside ``g``, in float32 at least: what is mixed, its residuals, the iterate, the best one
    and the product at hand. The residual reported is ``‖g − (I − Jᵀ) u‖ / ‖g‖`` of the best iterate, which is the
    solution returned.

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
        history = _History(g, min(self.memory, self.terms))
        while taken < self.terms:
            residual = history.add(u, vjp(u)) / scale
            taken += 1
            if not math.isfinite(residual):
                stop = StopReason.NOT_FINITE
                break
            if residual < smallest:
                smallest, best = residual, u
            if residual <= self.tolerance:
                stop = StopReason.CONVERGED
                break
            u = history.mix()
        return Solution(solution=best, best=best, terms=taken, residual=smallest, stop=stop)


class _History:
    """The newest image and its residual, in the last rows, and above them how the ones before differ from the next."""

    def __init__(self, g: Tensor, memory: int) -> None:
        wide = torch.promote_types(g.dtype, torch.float32)
        self.g = g.detach()
        self.images = g.new_empty(memory, g.numel(), dtype=wide)
        self.residuals = torch.empty_like(self.images)
        self.added = 0

    def add(self, u: Tensor, product: Tensor) -> float:
        """Take in ``g + Jᵀ u``, given the product ``Jᵀ u``; returns the norm of its residual."""
        image, residual = (rows[-1].view(self.g.shape) for rows in (self.images, self.residuals))
        differences = len(self.images) - 1
        replaced = (self.added - 1) % differences if self.added and differences else None
        if replaced is not None:
            for rows in (self.images, self.residuals):
                torch.neg(rows[-1], out=rows[replaced])
        torch.sub(image.copy_(product.detach()).add_(self.g), u.detach(), out=residual)
        if replaced is not None:
            for rows in (self.images, self.residuals):
                rows[replaced].add_(rows[-1])
        self.added += 1
        return _norm(residual)

    def mix(self) -> Tensor:
        """``Σ wᵢ imageᵢ`` with ``Σ wᵢ = 1`` minimising ``‖Σ wᵢ residualᵢ‖``, by least squares on the differences."""
        newest, kept = self.images[-1], min(self.added, len(self.images)) - 1
        if not kept:
            return newest.clone().view(self.g.shape).to(self.g.dtype)
        with _uncast(newest.device):
            triangle = _triangle(self.residuals, [*range(kept), -1])
            # A pseudo-inverse: iterates that have become linearly dependent get no weight instead of a crash.
            weights = torch.linalg.pinv(triangle[:kept, :kept]) @ triangle[:kept, kept]
            mixed = torch.addmv(newest, self.images[:kept].T, weights, alpha=-1)
        return mixed.view(self.g.shape).to(self.g.dtype)


PART = 2**16  # entries of a vector that are copied at a time


def _triangle(vectors: Tensor, chosen: list[int]) -> Tensor:
    """``R`` of the QR decomposition whose columns are the chosen rows, part by part, so that no ``Q`` is held."""
    triangle = vectors.new_empty(0, len(chosen))
    for part in torch.split(vectors, PART, dim=1):
        triangle = torch.linalg.qr(torch.cat([triangle, part[chosen].T]), mode="r").R
    return triangle


@dataclass(frozen=True, kw_only=True)
class GMRES(Solver):
    """Generalised minimal residuals: the best ``u`` in the Krylov space that the vector-Jacobian products span.

    Holds ``terms + 2`` vectors beside ``g``, in float32 at least: a basis and the product at hand or the solution. With
    more than 16 terms the basis grows by 16 vectors at a time, and is copied as it does. The residual reported is
    ``‖g − (I − Jᵀ) u‖ / ‖g‖``, from the Arnoldi relation.

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
        krylov = _Krylov(g, scale, self.terms)
        stop = StopReason.BUDGET
        residual = 1.0
        while krylov.size < self.terms:
            if not krylov.grow(vjp):
                stop = StopReason.NOT_FINITE
                break
            residual = krylov.solve()
            if residual <= self.tolerance or krylov.exhausted:
                rounding = 100 * torch.finfo(krylov.basis.dtype).eps
                stop = StopReason.CONVERGED if residual <= max(self.tolerance, rounding) else StopReason.BUDGET
                break
        solution = krylov.combine() if krylov.weights.numel() else g
        spent = krylov.size + (stop is StopReason.NOT_FINITE)
        return Solution(solution=solution, best=solution, terms=spent, residual=residual, stop=stop)


GROWTH = 16  # vectors that a basis grows by


@dataclass
class _Krylov:
    """Arnoldi basis of ``span{g, (I − Jᵀ) g, …}``, the rows of one tensor, and the small problem on it."""

    g: Tensor
    scale: float
    terms: int
    basis: Tensor = field(init=False)
    columns: list[Tensor] = field(default_factory=list)
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    exhausted: bool = False

    def __post_init__(self) -> None:
        wide = torch.promote_types(self.g.dtype, torch.float32)
        self.basis = self.g.new_empty(min(self.terms + 1, GROWTH + 1), self.g.numel(), dtype=wide)
        self._row(0).copy_(self.g.detach()).div_(self.scale)

    @property
    def size(self) -> int:
        return len(self.columns)

    def _row(self, index: int) -> Tensor:
        """A basis vector, in the shape of ``g``."""
        return self.basis[index].view(self.g.shape)

    def grow(self, vjp: VJP) -> bool:
        """Add one basis vector; False if it is not finite."""
        if self.size + 1 == len(self.basis):
            more = min(GROWTH, self.terms + 1 - len(self.basis))
            self.basis = torch.cat([self.basis, self.basis.new_empty(more, self.basis.shape[1])])
        known, vector = self.basis[: self.size + 1], self.basis[self.size + 1]
        newest = self._row(self.size)
        torch.sub(newest, vjp(newest.to(self.g.dtype)).detach(), out=self._row(self.size + 1))
        before = _norm(vector)
        if not math.isfinite(before):
            return False
        with _uncast(vector.device):
            column = known @ vector
            vector.addmv_(known.T, column, alpha=-1)
            # A second pass keeps the basis orthogonal to rounding.
            correction = known @ vector
            vector.addmv_(known.T, correction, alpha=-1)
        length = torch.linalg.vector_norm(vector)
        weights = torch.cat([column + correction, length[None]])
        # Their squares can leave the range of numbers where the vector itself has not.
        if not bool(weights.isfinite().all()):
            return False
        self.columns.append(weights)
        self.exhausted = float(length) <= before * torch.finfo(vector.dtype).eps * 10
        if not self.exhausted:
            vector.div_(length)
        return True

    def solve(self) -> float:
        """Weights of the basis that minimise the residual; returns it relative to ``‖g‖``."""
        size = self.size
        hessenberg = self.basis.new_zeros(size + 1, size, device="cpu")
        for j, column in enumerate(self.columns):
            hessenberg[: j + 2, j] = column.cpu()
        target = hessenberg.new_zeros(size + 1, 1)
        target[0] = 1
        with _uncast(hessenberg.device):
            self.weights = torch.linalg.lstsq(hessenberg, target, driver="gelsd").solution[:, 0]
            return float(torch.linalg.vector_norm(target[:, 0] - hessenberg @ self.weights))

    def combine(self) -> Tensor:
        """The solution in the shape and dtype of ``g``."""
        weights = self.weights.to(self.basis.device)
        with _uncast(weights.device):
            solution = self.basis[: len(weights)].T @ weights
        return solution.mul_(self.scale).view(self.g.shape).to(self.g.dtype)
