"""Who computes the edges: what `auto` takes, what it says, and what cannot be had."""

import copy
import logging
import pickle
from collections.abc import Iterator
from typing import get_args, get_type_hints

import pytest
import torch
from maths_cases import Size, batch_of, graph_of, plan_of

from gcahng.errors import InputError
from gcahng.graph import GraphNetwork, backends
from gcahng.graph.backends import BACKENDS, FusedKernels, choose_backend, make_kernels
from gcahng.graph.kernels.compiled import CompiledKernels, compiler_problem
from gcahng.graph.kernels.cpu import CpuKernels
from gcahng.graph.kernels.triton_kernels import TritonKernels, triton_problem
from gcahng.training import config_types
from gcahng.training.config_schema import GraphConfig

SIZE = Size(4, 2, 8, 1, 2)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def nothing_said() -> Iterator[None]:
    """No choice was made or announced yet, and none of this test's is left behind."""
    backends._automatic.cache_clear()
    backends._announce.cache_clear()
    yield
    backends._automatic.cache_clear()
    backends._announce.cache_clear()


@pytest.fixture
def cuda_with(monkeypatch: pytest.MonkeyPatch, nothing_said: None):
    """A GPU for which Triton and the compiler have the given problems."""

    def arrange(triton: str | None = None, compiler: str | None = None) -> None:
        monkeypatch.setattr(backends, "triton_problem", lambda device: triton)
        monkeypatch.setattr(backends, "compiler_problem", lambda device: compiler)
        backends._automatic.cache_clear()

    return arrange


@pytest.fixture
def without_compiler() -> Iterator[None]:
    """A machine on which torch finds no C++ compiler."""
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield
    cpp_builder.cpp_compiler_search.cache_clear()


def test_auto_on_the_cpu_is_plain_torch_and_says_so_once(nothing_said: None, caplog: pytest.LogCaptureFixture) -> None:
    z, labels = batch_of(SIZE)
    with caplog.at_level(logging.INFO, logger="gcahng.graph.backends"):
        for _ in range(2):
            graph = graph_of(SIZE)
            graph(z, labels)
            graph(z[:6], labels[:6])
    assert graph.backend == "auto"
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("Graph backend on cpu: eager (matrix products fill the time")


@pytest.mark.parametrize("backend", ["eager", "scatter"])
def test_a_backend_asked_for_by_name_is_taken_silently(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    z, labels = batch_of(SIZE)
    with caplog.at_level(logging.INFO, logger="gcahng.graph.backends"):
        graph_of(SIZE, backend=backend)(z, labels)
    assert not caplog.messages


def test_auto_on_cuda_takes_the_first_that_works(cuda_with) -> None:
    pytest.importorskip("triton")
    cuda_with()
    assert choose_backend("auto", CUDA, 512, 16).name == "triton"
    cuda_with(triton="too old")
    assert choose_backend("auto", CUDA, 512, 16) == backends.Choice("compiled", "not triton: too old")
    cuda_with(triton="too old", compiler="no compiler")
    choice = choose_backend("auto", CUDA, 512, 16)
    assert choice == backends.Choice("eager", "not triton: too old; not compiled: no compiler")


@pytest.mark.parametrize(
    ("dim", "block", "reason"),
    [
        (8200, 16, "embeddings may have 8192 channels there: got 8200"),
        (512, 129, "blocks may have 128 nodes there: got 129"),
    ],
)
def test_sizes_that_no_triton_kernel_holds_are_compiled(cuda_with, dim: int, block: int, reason: str) -> None:
    pytest.importorskip("triton")
    cuda_with()
    assert choose_backend("auto", CUDA, dim, block) == backends.Choice("compiled", f"not triton: {reason}")
    assert choose_backend("auto", CUDA, 8192, 128).name == "triton"


def test_each_reason_is_said_once(cuda_with, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gcahng.graph.backends"):
        cuda_with(triton="too old")
        for dim in (64, 64, 128):
            choose_backend("auto", CUDA, dim, 16)
        cuda_with(triton="not installed")
        choose_backend("auto", CUDA, 64, 16)
    assert caplog.messages == [
        "Graph backend on cuda: compiled (not triton: too old).",
        "Graph backend on cuda: compiled (not triton: not installed).",
    ]


@pytest.mark.skipif(triton_problem("cpu") is None, reason="Triton interprets its kernels in this process")
def test_triton_on_the_cpu_is_refused() -> None:
    z, labels = batch_of(SIZE)
    with pytest.raises(InputError, match=r"backend 'triton' cannot run on cpu: .*\. Use backend 'auto'"):
        graph_of(SIZE, backend="triton")(z, labels)


def test_compiling_without_a_compiler_is_refused(without_compiler: None) -> None:
    z, labels = batch_of(SIZE)
    message = r"'compiled' cannot run on cpu: no C\+\+ compiler is found \(.*no-such-compiler.*\)\. Use backend 'auto'"
    with pytest.raises(InputError, match=message):
        graph_of(SIZE, backend="compiled")(z, labels)


def test_compiling_on_cuda_needs_triton() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(InputError, match="cannot run on cuda: the package triton is missing or finds no usable GPU"):
        choose_backend("compiled", CUDA, 8, 4)


def test_compiling_on_cuda_needs_what_starts_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setenv("CC", "a-compiler")
    assert compiler_problem(CUDA) is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    problem = compiler_problem(CUDA)
    assert problem is not None
    assert "needs a C compiler" in problem


def test_the_old_name_is_answered_with_the_new_one() -> None:
    message = r"`backend` 'pairs' is now called 'eager': .*Write 'eager', or 'auto'"
    with pytest.raises(InputError, match=message):
        GraphNetwork(8, 5, backend="pairs")  # type: ignore[arg-type]


def test_kernels_by_name_and_device() -> None:
    assert type(make_kernels("eager", CPU)) is CpuKernels
    assert type(make_kernels("compiled", CPU)) is type(make_kernels("compiled", CUDA)) is CompiledKernels
    names = [make_kernels(name, CUDA).name for name in ("eager", "compiled")]
    assert names == ["eager", "compiled"]
    # Triton's kernels first, compiled functions for what they leave to their base class.
    assert FusedKernels.__mro__.index(TritonKernels) < FusedKernels.__mro__.index(CompiledKernels)
    assert FusedKernels.mix is TritonKernels.mix
    assert FusedKernels.mix_backward is CompiledKernels.mix_backward
    assert FusedKernels.name == "triton"


def test_a_network_keeps_its_kernels_and_shares_none() -> None:
    z, labels = batch_of(SIZE)
    graph = graph_of(SIZE, dropout=0.0)
    plan = plan_of(SIZE)
    graph(z, labels, plan=plan)
    kernels = graph.kernels(plan, z.device)
    assert graph.kernels(plan, z.device) is kernels
    for twin in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        # Kernels of another machine are not even made.
        assert not twin._kernels
        assert twin.kernels(plan, z.device) is not kernels
        assert torch.equal(twin(z, labels, plan=plan).node_logits, graph(z, labels, plan=plan).node_logits)


def test_the_configuration_knows_the_same_words() -> None:
    of_config, of_network = get_type_hints(GraphConfig), get_type_hints(GraphNetwork.__init__)
    assert get_args(of_config["backend"]) == get_args(of_network["backend"]) == BACKENDS
    for name in ("edge_dropout", "norm", "edge_aggregation"):
        assert get_args(of_config[name]) == get_args(of_network[name])


def test_the_configuration_knows_the_same_old_words() -> None:
    assert config_types._RENAMED == backends.RENAMED
