"""The losses that a readout can be trained with: what they cost, and the probability that they are of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from crbp._checks import choice, non_negative
from crbp.losses import constant_loss, evidential_loss, expected_probability, focal_loss

Loss = Literal["focal", "evidential"]


class Readout(Protocol):
    """What `ContourTask` asks of a loss. Logits are ``(B, 2, H, W)``, masks ``(B, H, W)`` of bool."""

    @property
    def annealed(self) -> bool:
        """Whether it changes through training, whose end must then be known."""

    def cost(self, logits: Tensor, mask: Tensor, done: float) -> Tensor:
        """The loss after a share ``done`` of the training."""

    def probability(self, logits: Tensor) -> Tensor:
        """Of each pixel to lie on the target, ``(B, H, W)``."""

    def progress(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """A loss of these logits, and no less than the best that looks at no image can have."""


@dataclass(frozen=True, kw_only=True)
class Focal:
    """See `crbp.losses.focal_loss`."""

    gamma: float = 2.0
    annealed: bool = False

    def cost(self, logits: Tensor, mask: Tensor, done: float) -> Tensor:
        """The same throughout."""
        return focal_loss(logits, mask, self.gamma)

    def probability(self, logits: Tensor) -> Tensor:
        """The softmax."""
        return logits.float().softmax(dim=1)[:, 1]

    def progress(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and that of the best constant answer."""
        return focal_loss(logits, mask, self.gamma), constant_loss(mask, self.gamma)


@dataclass(frozen=True, kw_only=True)
class Evidential:
    """See `crbp.losses.evidential_loss`; ``kl_weight`` is that of the end of training."""

    kl_weight: float = 0.1

    @property
    def annealed(self) -> bool:
        """The weight rises from 0."""
        return self.kl_weight > 0

    def cost(self, logits: Tensor, mask: Tensor, done: float) -> Tensor:
        """With the weight of this moment."""
        return evidential_loss(logits, mask, self.kl_weight * done)

    def probability(self, logits: Tensor) -> Tensor:
        """The expected one."""
        return expected_probability(logits)[:, 1]

    def progress(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The part of the loss that is a cross-entropy, and that of the best constant answer."""
        return evidential_loss(logits, mask, 0.0), constant_loss(mask, 0.0)


def readout(loss: Loss, gamma: float | None, kl_weight: float | None) -> Readout:
    """The loss of a name.

    Raises:
        ValueError: if there is none, or a number is out of range or of another loss.
    """
    choice("loss", loss, get_args(Loss))
    for name, value, owner in (("gamma", gamma, "focal"), ("kl_weight", kl_weight, "evidential")):
        if value is None:
            continue
        if owner != loss:
            raise ValueError(f"{name}={value!r} is of the {owner} loss; leave it out with loss={loss!r}")
        non_negative(name, value)
    if loss == "focal":
        return Focal() if gamma is None else Focal(gamma=gamma)
    return Evidential() if kl_weight is None else Evidential(kl_weight=kl_weight)
