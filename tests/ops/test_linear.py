from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from crbp.ops._linear import linearise


def pull(gradient: Tensor, x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    _, back = torch.func.vjp(lambda a, b: torch.exp(a - a.mean(1, keepdim=True)) * torch.tanh(b * scale), x, y)
    return back(gradient)  # type: ignore[no-any-return]


def test_the_two_parts_are_the_whole_and_the_second_is_linear() -> None:
    torch.manual_seed(0)
    gradient, other, x, y, scale = (torch.randn(3, 4, dtype=torch.float64) for _ in range(5))
    linear = linearise(make_fx(pull)(gradient, x, y, scale))
    assert linear is not None
    arguments = x, y, scale
    kept = [*linear.residuals(*arguments), *(arguments[place] for place in linear.needed)]
    torch.testing.assert_close(tuple(linear.product(gradient, *kept)), pull(gradient, *arguments))
    both = tuple(linear.product(2 * gradient + other, *kept))
    torch.testing.assert_close(both, pull(2 * gradient + other, *arguments))
    dear = {torch.ops.aten.exp.default, torch.ops.aten.tanh.default}
    assert dear <= {node.target for node in linear.residuals.graph.nodes}
    assert not dear & {node.target for node in linear.product.graph.nodes}


def test_what_is_cheap_is_not_kept() -> None:
    def sheared(gradient: Tensor, x: Tensor) -> Tensor:
        return (gradient * (x + 1) * 2,)  # type: ignore[return-value]

    gradient, x = torch.randn(5), torch.randn(5)
    linear = linearise(make_fx(sheared)(gradient, x))
    assert linear is not None
    assert len(linear.residuals(x)) == 0
    assert linear.needed == (0,)
    torch.testing.assert_close(linear.product(gradient, x)[0], sheared(gradient, x)[0])


def test_what_writes_or_draws_is_left_whole() -> None:
    gradient, x = torch.randn(5), torch.randn(5)
    assert linearise(make_fx(lambda g, x: (g * torch.dropout(x, 0.5, train=True),))(gradient, x)) is None
    assert linearise(make_fx(lambda g, x: (g * (x * 1).view(-1).mul_(2),))(gradient, x)) is None
