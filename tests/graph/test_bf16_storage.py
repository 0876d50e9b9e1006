"""The edge buffer in bfloat16, as CUDA stores it: both losses of a step, on the CPU."""

from dataclasses import replace

import pytest
import torch
from generation_cases import Case, both_losses
from maths_cases import Size
from torch import Tensor

from gcahng.generation import LossFactors, generation_loss
from gcahng.graph import GraphNetwork, network

# Frobenius norm of the difference over that of what is wanted.
BFLOAT16 = 4e-2
# Blocks with padding, mirrored and diagonal chunks; one block holds all; two layers, whose buffers take gradients.
SIZES = [Size(7, 2, 32, 1, 2), Size(5, 3, 48, 2, 4)]


def case_of(size: Size, **options: object) -> Case:
    return Case(size, options={"backend": "eager", **options}, dtype=torch.float32, per_block=2)


def network_of(case: Case, keep_bytes: int | None) -> GraphNetwork:
    """A network at its start: one with random parameters magnifies every rounding."""
    size = case.size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        graph = GraphNetwork(size.dim, 12, size.layers, size.heads, **case.options)  # type: ignore[arg-type]
    graph.keep_bytes = graph.keep_bytes if keep_bytes is None else keep_bytes
    return graph


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """The losses one by one, the gradient of z, and those of all parameters together."""
    assert got.keys() == want.keys()
    groups: dict[str, list[str]] = {}
    for name in want:
        is_parameter = name.startswith("gradient ") and name != "gradient z"
        groups.setdefault("parameters" if is_parameter else name, []).append(name)
    for group, names in groups.items():
        off = torch.cat([(got[name] - want[name]).flatten() for name in names]).norm()
        error = float(off / torch.cat([want[name].flatten() for name in names]).norm())
        assert error < tolerance, f"{group} is off by {error:.1e}"


@pytest.fixture
def stored_low(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Stores edge buffers as on CUDA; lists in which dtypes."""
    seen: list[torch.dtype] = []
    original = network._storage

    def storage(z: Tensor, low: torch.dtype | None) -> torch.dtype:
        seen.append(original(z.to("meta"), low))
        return seen[-1]

    monkeypatch.setattr(network, "_storage", storage)
    return seen


@pytest.mark.parametrize("keep_bytes", [None, 0], ids=["kept", "computed again"])
@pytest.mark.parametrize("edge_dropout", ["tied", "independent"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_both_losses_stay_close(
    size: Size, edge_dropout: str, keep_bytes: int | None, stored_low: list[torch.dtype]
) -> None:
    case = case_of(size, edge_dropout=edge_dropout)
    want = both_losses(case, network_of(case, None))
    assert set(stored_low) == {torch.float32}
    stored_low.clear()
    graph = network_of(case, keep_bytes)
    with torch.autocast("cpu", torch.bfloat16):
        got = both_losses(case, graph)
    assert stored_low == [torch.bfloat16] * 2
    assert {t.dtype for t in got.values()} == {torch.float32}
    assert_near(got, want, BFLOAT16)


def test_float16_keeps_small_gradients(stored_low: list[torch.dtype]) -> None:
    """What the generation loss makes before the loss scaler takes part is far below the range of float16."""
    case, scale = case_of(SIZES[0]), 2.0**16
    z, labels = case.batch()
    small = LossFactors(2e-4, 2e-4, 2e-5)

    def gradients(graph: GraphNetwork, low: torch.dtype | None) -> dict[str, Tensor]:
        with torch.autocast("cpu", low, enabled=low is not None):
            output = graph(z, labels, dropout_key=4, plan=case.plan())
            assert output.coefficients is not None
            classifier = replace(case.classifier(), low=low)
            classes = labels[: case.size.num_classes]
            losses = generation_loss(z, output.coefficients, case.synthesis(), classifier, classes, small)
        (losses.total * scale).backward()
        return {f"gradient {n}": p.grad / scale for n, p in graph.named_parameters() if p.grad is not None}

    want, got = (gradients(network_of(case, None), low) for low in (None, torch.float16))
    assert set(stored_low) == {torch.float32}
    assert_near(got, want, 1e-2)
