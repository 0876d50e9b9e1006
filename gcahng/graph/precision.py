"""Matrix products in the autocast dtype, everything between them in the embeddings' own dtype.

The element-wise chain of the graph (edge products, softmax, norms) loses its signal in bfloat16: a first-layer edge
has an rms of 1/D beside an attention output of about 0.3. So the graph turns autocast off inside and lowers the
operands of its matrix products only.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

P = ParamSpec("P")
Result = TypeVar("Result")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on x's device; None without autocast or for float64 input."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(backward: Callable[P, Result]) -> Callable[P, Result]:
    """A `backward(ctx, *gradients)` that keeps its own precision where it is called inside an autocast region."""

    @wraps(backward)
    def run(*arguments: P.args, **named: P.kwargs) -> Result:
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        with torch.autocast(device.type, enabled=False):
            return backward(*arguments, **named)

    return run


# On the CPU, products with fewer rows gain nothing from lower precision: converting the weights costs more.
FEWEST_ROWS_ON_CPU = 64


def node_dtype(nodes: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype for matrix products over nodes (B, D), where `dtype` is that of the edges' products."""
    if nodes.device.type == "cpu" and nodes.shape[0] < FEWEST_ROWS_ON_CPU:
        return None
    return dtype


def product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """x Wᵀ + bias with the product's operands in `dtype` and the result back in x's dtype."""
    if dtype is None:
        return F.linear(x, weight, bias)
    result = F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)
    return result if bias is None else result + bias


def linear(x: Tensor, layer: nn.Linear, dtype: torch.dtype | None) -> Tensor:
    """`layer(x)` by `product`."""
    return product(x, layer.weight, layer.bias, dtype)
