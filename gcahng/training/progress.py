"""Where a run stands: counters and the best evaluations, as `state.json` of a checkpoint holds them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Where a run stands; saved in `state.json`.

    Attributes:
        epoch: Epochs finished.
        batch: Batches finished of the epoch that is under way.
        step: Iterations finished, those without effect (`dropped`) included.
        skipped: Unreadable images replaced so far, on all ranks.
        repaired: Draws of the sampler so far that gave way to others, since their batch held them already.
        dropped: Steps so far that met numbers that are not finite and were left out.
        best: Best evaluation row by split: "validation" by MAP@R, "test" by R@1 and then MAP@R.
        scores: What the best rows were chosen by: [MAP@R], or [R@1, MAP@R].
        last: Newest evaluation rows by split.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    skipped: int = 0
    repaired: int = 0
    dropped: int = 0
    best: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    last: dict[str, dict[str, Any]] = field(default_factory=dict)

    def note_evaluation(self, split: str, row: dict[str, Any], score: list[float]) -> None:
        """Take an evaluation's row, the best so far if its score is higher than all before."""
        self.last[split] = row
        if split not in self.scores or score > self.scores[split]:
            self.scores[split] = score
            self.best[split] = row | {"step": self.step}

    def evaluated(self) -> bool:
        """Whether the last finished epoch has been evaluated."""
        return bool(self.last.get("test", {}).get("epoch") == self.epoch)
