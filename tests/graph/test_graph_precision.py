"""float32 and bfloat16: how far the fast path is from float64, beside the plain edge list."""

from contextlib import nullcontext

import pytest
import torch
from maths_cases import Size, batch_of, errors, graph_of, plan_of, results

from gcahng.graph import GraphNetwork, PairCoefficients, network
from gcahng.graph.edge_messages import EdgePass
from gcahng.graph.edge_update import EndTerms
from gcahng.graph.precision import autocast_dtype, product, without_autocast

CASES = {
    "released": (Size(9, 3, 32, 2, 4), {}),
    "layer norm": (Size(8, 2, 24, 1, 2), {"norm": "layer_norm"}),
    "no edge-to-node sum": (Size(7, 3, 16, 2, 2), {"edge_to_node": False}),
}


def kind(name: str) -> str:
    return "gradients" if name.startswith("gradient ") and name != "gradient z" else name


def worst(found: dict[str, float]) -> dict[str, float]:
    """The largest error of the outputs, of z's gradient and of the parameters' gradients."""
    by_kind: dict[str, float] = {}
    for name, error in found.items():
        by_kind[kind(name)] = max(by_kind.get(kind(name), 0.0), error)
    return by_kind


@pytest.mark.parametrize("case", CASES)
def test_float32_error_is_that_of_the_plain_edge_list(case: str) -> None:
    """At most twice the plain path's error, plus 2e-6.

    Which of two roundings hits a single tensor harder is chance; the rule is applied to the worst tensor of each
    kind, summed over a few batches.
    """
    size, options = CASES[case]
    fast_error: dict[str, float] = {}
    plain_error: dict[str, float] = {}
    seeds = range(3)
    for seed in seeds:
        z, labels = batch_of(size, seed)

        def run(backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
            graph = graph_of(size, seed, backend=backend, **options).to(dtype)  # noqa: B023
            plan = plan_of(size)
            return results(graph, z.to(dtype), labels, dropout_key=seed, plan=plan)  # noqa: B023

        exact = run("scatter", torch.float64)
        for backend, total in (("eager", fast_error), ("scatter", plain_error)):
            for name, error in worst(errors(run(backend, torch.float32), exact)).items():
                total[name] = total.get(name, 0.0) + error
    for name, error in fast_error.items():
        assert error <= 2 * plain_error[name] + 2e-6 * len(seeds), name


def test_products_lower_their_operands_and_return_the_own_dtype() -> None:
    x, weight, bias = (torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in ((5, 64), (7, 64), (7,)))
    low = product(x, weight, bias, torch.bfloat16)
    assert low.dtype == torch.float32
    exact = product(x, weight, bias, None)
    assert 0 < float((low - exact).abs().max() / exact.abs().max()) < 2e-2
    want = (x.bfloat16() @ weight.bfloat16().T).float() + bias
    assert torch.equal(low, want)


def test_autocast_is_asked_for_the_dtype() -> None:
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert autocast_dtype(single) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype(single) == torch.bfloat16
        assert autocast_dtype(double) is None
        with torch.autocast("cpu", enabled=False):
            assert autocast_dtype(single) is None


@pytest.mark.parametrize("backend", ["eager", "scatter"])
@pytest.mark.parametrize("size", [Size(9, 3, 32, 1, 4), Size(9, 3, 64, 2, 4)], ids=str)
def test_bfloat16_stays_close(size: Size, backend: str) -> None:
    """Outputs and gradients of a network at its start, as Frobenius norms."""
    z, labels = batch_of(size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = GraphNetwork(size.dim, 12, size.layers, size.heads, backend=backend)
    exact = results(graph, z.float(), labels, dropout_key=1)
    with torch.autocast("cpu", torch.bfloat16):
        low = results(graph, z.float(), labels, dropout_key=1)
    groups: dict[str, list[str]] = {}
    for name in exact:
        if not name.startswith("buffer"):
            groups.setdefault(kind(name), []).append(name)
    for members in groups.values():
        difference = torch.cat([(low[n] - exact[n]).flatten() for n in members]).norm()
        length = torch.cat([exact[n].flatten() for n in members]).norm()
        # bfloat16 took part, and did little harm.
        assert 1e-4 < float(difference / length) < 4e-2, members


def test_edges_stay_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain of element-wise operations on edges keeps its precision; products alone are lowered."""
    size = Size(5, 2, 16, 2, 2)
    z, labels = batch_of(size)
    graph = graph_of(size).float()
    seen: list[torch.dtype] = []
    original = network.update_edges

    def watch(source: object, terms: EndTerms, weights: object, rule: object, call: EdgePass) -> object:
        updated = original(source, terms, weights, rule, call)  # type: ignore[arg-type]
        seen.extend(t.dtype for t in (terms.direction, terms.offset, terms.value, updated.raw))
        assert call.low == torch.bfloat16
        return updated

    monkeypatch.setattr(network, "update_edges", watch)
    with torch.autocast("cpu", torch.bfloat16):
        output = graph(z.float(), labels, dropout_key=1)
    assert set(seen) == {torch.float32}
    assert len(seen) == 8
    assert isinstance(output.coefficients, PairCoefficients)
    assert {t.dtype for t in output.coefficients.read_out.tensors} == {torch.float32}


def gradients(graph: GraphNetwork, z: torch.Tensor, labels: torch.Tensor, *, inside: bool) -> dict[str, torch.Tensor]:
    """Gradients under autocast, the backward pass inside the region or behind it."""
    graph.zero_grad(set_to_none=True)
    z = z.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = graph(z, labels, dropout_key=1)
        loss = output.node_logits.square().sum() + output.pull_coefficients.square().sum()
        with torch.autocast("cpu", enabled=False) if not inside else nullcontext():
            loss.backward()
    assert z.grad is not None
    return {"z": z.grad} | {n: p.grad.clone() for n, p in graph.named_parameters() if p.grad is not None}


def test_a_backward_pass_inside_autocast_gives_the_same() -> None:
    size = Size(5, 2, 16, 2, 2)
    z, labels = batch_of(size)
    graph = graph_of(size).float()
    outside, inside = (gradients(graph, z.float(), labels, inside=flag) for flag in (False, True))
    assert outside.keys() == inside.keys()
    for name, gradient in outside.items():
        # Nothing but edge operations lies between the loss and these.
        if "edge_blocks.1" in name and "ffn" in name:
            assert torch.equal(inside[name], gradient), name
    # A float32 pass whose backward happens to run inside autocast.
    z = z.float().requires_grad_()
    loss = graph(z, labels, dropout_key=1).pull_coefficients.square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_without_autocast_passes_everything_on() -> None:
    @without_autocast
    def backward(ctx: str, first: torch.Tensor | None, second: torch.Tensor) -> tuple[object, ...]:
        return ctx, first, second, torch.is_autocast_enabled("cpu")

    with torch.autocast("cpu", torch.bfloat16):
        one = torch.ones(1)
        assert backward("ctx", None, one) == ("ctx", None, one, False)
        assert torch.is_autocast_enabled("cpu")


def test_half_precision_input_is_raised_under_autocast() -> None:
    size = Size(4, 2, 8, 1, 2)
    z, labels = batch_of(size)
    with torch.autocast("cpu", torch.bfloat16):
        output = graph_of(size).float()(z.bfloat16(), labels, dropout_key=1)
    assert output.node_logits.dtype == torch.float32
    assert output.pull_coefficients.dtype == torch.float32
