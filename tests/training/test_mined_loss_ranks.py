"""Two ranks train with losses and miners of pytorch-metric-learning as one process does, and go on after a cut."""

from pathlib import Path
from typing import Any

import pytest
from exact_cases import too_large
from exact_ranks import check_cases
from pml_cases import CASES, all_of_it
from rank_group import run_ranks
from run_cases import assert_same_tensors, saved_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def found(shards: Path, folder: Path) -> list[dict[str, Any]]:
    return run_ranks(2, all_of_it, shards, folder)


def test_ranks_equal_one_process(found: list[dict[str, Any]]) -> None:
    """Losses, gradients, parameters and the memory's rows, with the graph and generation on."""
    check_cases([_Cases(one["cases"]) for one in found], len(CASES))  # type: ignore[misc]


class _Cases:
    def __init__(self, cases: Any) -> None:
        self.cases = cases


def test_a_miner_that_drew_otherwise_on_each_rank_would_be_noticed(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert "gradient:metric_model" in too_large(one["draws of each rank"][0].errors, 1e-6)


def test_a_memory_goes_on_where_it_was_cut(found: list[dict[str, Any]], folder: Path) -> None:
    for one in found:
        assert one["whole"]["loss.has_been_filled"].item() is True
        assert one["whole"]["loss.queue_idx"].item() == 4 * 8 % 13
        assert_same_tensors(one["resumed"], one["whole"])
        assert_same_tensors(one["whole"], found[0]["whole"])
    saved = saved_tensors(folder / "cut")
    assert_same_tensors(saved, saved_tensors(folder / "whole"))
    assert saved["metric_loss.safetensors: loss.embedding_memory"].any(1).all()
    assert "metric_loss.safetensors: loss.queue_idx" in saved
