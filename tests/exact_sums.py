"""Every sum over ranks that the maths asks for, left out one at a time: the comparison with one process must notice.

A sum is known by the line that asks for it. Two ways to get it wrong: the rank's own part in place of the sum, and a
sum whose backward pass hands back the rank's own gradient in place of the sum of all ranks'.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from exact_cases import ExactCase, MakeBackend, Outcome, errors_by_kind, run_case, too_large
from torch import Tensor

from gcahng.distributed import Ranks
from gcahng.training.finite_checks import NotFinite

# Sums that say whether something is not finite: nothing is in these cases.
LOOK_OUTS = ("finite_checks", "ddp_backend")

Sum = Callable[[Ranks, Tensor], Tensor]
WHOLE: Sum = Ranks.sum


def own_part(ranks: Ranks, partial: Tensor) -> Tensor:
    return partial


def own_gradient(ranks: Ranks, partial: Tensor) -> Tensor:
    return partial + (WHOLE(ranks, partial.detach()) - partial.detach())


WRONG: dict[str, Sum] = {"left out": own_part, "gradient not summed": own_gradient}


@dataclass(frozen=True)
class WrongSums:
    """Sums by the line that asks for them, and what was made wrong with them.

    Attributes:
        tried: All there are.
        unnoticed: Those without which no case had an error.
    """

    tried: list[str]
    unnoticed: list[str]


def wrong_sums(ranks: Ranks, cases: Sequence[ExactCase], make_backend: MakeBackend, least: float) -> WrongSums:
    """Run cases with each sum made wrong; an error is what is above `least`."""
    wanted = [run_case(case) for case in cases]
    met: dict[tuple[str, str], list[int]] = {}
    for number, case in enumerate(cases):

        def note(self: Ranks, partial: Tensor, number: int = number) -> Tensor:
            for wrong in WRONG if partial.requires_grad else ("left out",):
                users = met.setdefault((_site(), wrong), [])
                users.extend([number] if number not in users else [])
            return WHOLE(self, partial)

        with patch.object(Ranks, "sum", note):
            run_case(case, ranks, make_backend)
    met = {key: users for key, users in sorted(met.items()) if not key[0].startswith(LOOK_OUTS)}
    unnoticed = [
        f"{site} {wrong}"
        for (site, wrong), users in met.items()
        if not any(_notices(ranks, cases[n], wanted[n], make_backend, site, WRONG[wrong], least) for n in users)
    ]
    return WrongSums([f"{site} {wrong}" for site, wrong in met], unnoticed)


def _notices(
    ranks: Ranks, case: ExactCase, want: Outcome, make_backend: MakeBackend, site: str, wrong: Sum, least: float
) -> bool:
    """Whether the comparison of a case fails on some rank when one sum is wrong on all."""

    def spoilt(self: Ranks, partial: Tensor) -> Tensor:
        return (wrong if _site() == site else WHOLE)(self, partial)

    try:
        with patch.object(Ranks, "sum", spoilt):
            got = run_case(case, ranks, make_backend)
        noticed = bool(too_large(errors_by_kind(got, want), least))
    except NotFinite:
        # Raised on all ranks together.
        noticed = True
    return ranks.host_max([float(noticed)]) == [1.0]


def _site() -> str:
    """The line that asks for the sum: of whoever called the caller of this."""
    frame = sys._getframe(2)
    return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}:{frame.f_lineno}"
