"""Activation memory of a training step against the number of steps of recurrence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

import crbp
from crbp._temporarily import temporarily
from crbp.gradients import GradientMethod
from crbp.models import PathfinderNet


def memory_curve(
    net: PathfinderNet,
    image: Tensor,
    *,
    gradient: GradientMethod,
    steps: Sequence[int],
    penalty: Callable[[crbp.Run], Tensor] | None = None,
) -> list[int]:
    """Bytes that autograd saves for one training step, for each number of steps.

    Counted exactly (`crbp.activation_memory`), so the figure is the same on every device. The model is left as it was.

    Args:
        net: the model.
        image: ``(B, 1, H, W)``.
        gradient: the gradient method.
        steps: numbers of steps of recurrence.
        penalty: on the run, counted as well.
    """
    found = []
    for n in steps:
        with (
            temporarily(net, evolve=replace(net.evolve, steps=n, gradient=gradient)),
            crbp.activation_memory(exclude=[*net.parameters(), image]) as memory,
        ):
            prediction = net(image)
            extra = penalty(prediction.run) if penalty is not None else None
        found.append(memory.bytes)
        del prediction, extra
    return found
