"""The edge stage's inner loops, each as one graph of torch.compile.

The functions are those of `EagerKernels`; the compiler fuses what stands between the matrix products. One graph serves
every number n of block pairs: the first axis of a chunk's tensors is marked as variable. A single block pair and a
chunk of single edges (b = 1) have graphs of their own, an empty chunk is left to plain torch. What autograd watches is
left to plain torch as well: the edge stage writes its backward pass out, so this concerns small tables only.

The first call of each function compiles it: seconds on CUDA, half a minute for the first of all on CPU.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor

from gcahng.graph.kernels.eager import EagerKernels, Function, HiddenWeights, MixGradient, NormWeights
from gcahng.graph.kernels.triton_kernels import launcher_problem


def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot work on a device, or None."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        # On a GPU torch.compile writes Triton kernels, and needs what starting them needs.
        return launcher_problem() if has_triton() else "the package triton is missing or finds no usable GPU"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        return f"no C++ compiler is found ({str(error).rstrip('.')})"
    return None


class CompiledKernels(EagerKernels):
    """Compiled twins of the functions that take whole chunks."""

    name = "compiled"
    keeps_mix_state = False

    def __init__(self, compiler: str = "inductor") -> None:
        """
        Args:
            compiler: A backend of torch.compile.
        """
        self._compiler = compiler
        self._functions: dict[Callable[..., Any], _Compiled] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledKernels":
        return type(self)(self._compiler)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._compiler,)

    def compile(self, function: Function) -> Function:
        if function not in self._functions:
            self._functions[function] = _Compiled(function, self._compiler, least_axes=3)
        return cast(Function, self._functions[function])

    def _of(self, method: Callable[..., Any], least_axes: int) -> "_Compiled":
        if method not in self._functions:
            self._functions[method] = _Compiled(method, self._compiler, least_axes)
        return self._functions[method]

    def normalise(self, x: Tensor, norm: NormWeights) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        found: Tensor = self._of(EagerKernels.normalise, 2)(_PLAIN, rows, norm)
        return found.view(x.shape)

    def normalise_backward(self, x: Tensor, grad: Tensor, norm: NormWeights) -> tuple[Tensor, Tensor, Tensor]:
        rows, grad = (t.reshape(-1, x.shape[-1]) for t in (x, grad))
        grad_x, weight, bias = self._of(EagerKernels.normalise_backward, 2)(_PLAIN, rows, grad, norm)
        return grad_x.view(x.shape), weight, bias

    def mix(
        self, edges: Tensor, values: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], norm: NormWeights
    ) -> Tensor:
        found: Tensor = self._of(EagerKernels.mix, 3)(_PLAIN, edges, values, weights, norm)
        return found

    def product_mix(
        self,
        factors: tuple[Tensor, Tensor],
        values: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
        norm: NormWeights,
    ) -> Tensor:
        found: Tensor = self._of(EagerKernels.product_mix, 3)(_PLAIN, factors, values, weights, norm)
        return found

    def mix_backward(
        self,
        edges: Tensor,
        values: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
        norm: NormWeights,
        grad: Tensor,
    ) -> MixGradient:
        found: MixGradient = self._of(EagerKernels.mix_backward, 3)(_PLAIN, edges, values, weights, norm, grad)
        return found

    def messages(
        self,
        edges: Tensor,
        weight: Tensor,
        bias: Tensor,
        masks: tuple[Tensor | None, Tensor | None],
        low: torch.dtype | None,
        *,
        mirrored: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        found: tuple[Tensor | None, Tensor, Tensor | None] = self._of(EagerKernels.messages, 3)(
            _PLAIN, edges, weight, bias, masks, low, mirrored=mirrored
        )
        return found

    def product_messages(
        self,
        factors: tuple[Tensor, Tensor],
        weight: Tensor,
        bias: Tensor,
        masks: tuple[Tensor | None, Tensor | None],
        low: torch.dtype | None,
        *,
        mirrored: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        found: tuple[Tensor | None, Tensor, Tensor | None] = self._of(EagerKernels.product_messages, 3)(
            _PLAIN, factors, weight, bias, masks, low, mirrored=mirrored
        )
        return found

    def messages_backward(
        self,
        edges: Tensor,
        inner: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        masks: tuple[Tensor | None, Tensor | None],
        low: torch.dtype | None,
        grads: tuple[Tensor, Tensor | None],
    ) -> Tensor:
        # (R, ...) as (n, b, b, ...): the marked axis is that of the other tensors.
        by_pair = None if inner is None else inner.view(*edges.shape[:3], inner.shape[-1])
        found: Tensor = self._of(_messages_backward, 3)(edges, by_pair, weight, bias, masks, low, grads)
        return found

    def hidden(
        self, x: Tensor, weights: HiddenWeights, low: torch.dtype | None, *, keep: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        found: tuple[Tensor | None, Tensor, Tensor, Tensor] = self._of(EagerKernels.hidden, 2)(
            _PLAIN, x, weights, low, keep=keep
        )
        return found

    def hidden_backward(
        self,
        x: Tensor,
        inner: Tensor | None,
        grad: Tensor,
        row: Tensor,
        mean: Tensor,
        weights: HiddenWeights,
        low: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = self._of(EagerKernels.hidden_backward, 2)(
            _PLAIN, x, inner, grad, row, mean, weights, low
        )
        return found


_PLAIN = EagerKernels()


class _Compiled:
    """A function as compiled graphs, called like the function."""

    def __init__(self, function: Callable[..., Any], compiler: str, least_axes: int) -> None:
        """
        Args:
            function: Without side effects; takes tensors, tuples of them, and constants.
            compiler: A backend of torch.compile.
            least_axes: Tensors with as many axes or more have a first axis that varies from chunk to chunk. What is
                inside other objects does not count.
        """
        self._function = function
        self._compiler = compiler
        self._least_axes = least_axes
        self._graphs: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        varying = [t for t in _tensors(arguments) if t.ndim >= self._least_axes]
        watched = torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(arguments))
        if watched or any(t.numel() == 0 for t in varying):
            return self._function(*arguments, **options)
        # Whether something has a gradient elsewhere must not make another graph.
        arguments = tuple(map(_bare, arguments))
        for tensor in _tensors(arguments):
            if tensor.ndim >= self._least_axes and tensor.shape[0] > 1:
                torch._dynamo.mark_dynamic(tensor, 0)
        return self._graph(arguments, options)(*arguments, **options)

    def _graph(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., Any]:
        """The graphs for arguments like these.

        torch.compile counts graphs per code object and gives up on the ninth: each kind of arguments has a copy of the
        code, so that the count is over the shapes of one kind.
        """
        key = (_kind(arguments), *options.items())
        if key not in self._graphs:
            self._graphs[key] = torch.compile(_own_code(self._function), backend=self._compiler, dynamic=False)
        return self._graphs[key]


def _kind(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What tells graphs apart beside shapes: dtypes, what is absent, switches."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype
        if isinstance(value, tuple):
            return _kind(value)
        return value if value is None or isinstance(value, bool | torch.dtype) else type(value)

    return tuple(map(of, arguments))


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, tuple):
            found.extend(_tensors(argument))
    return found


def _bare(value: Any) -> Any:
    """The same value with detached tensors, each an object of its own: one that comes twice would make a graph, too."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(map(_bare, value))
    if isinstance(value, NormWeights | HiddenWeights):
        return type(value)(**{name: _bare(entry) for name, entry in vars(value).items()})
    return value


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function with a code object of its own."""
    if not isinstance(function, FunctionType):
        return function
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _messages_backward(
    edges: Tensor,
    inner: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    low: torch.dtype | None,
    grads: tuple[Tensor, Tensor | None],
) -> Tensor:
    rows = None if inner is None else inner.flatten(0, 2)
    return _PLAIN.messages_backward(edges, rows, weight, bias, masks, low, grads)
