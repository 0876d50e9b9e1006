"""That nothing moves on numbers that are not finite: checked at once, or by flags on the device that are read later.

`ImmediateChecks` looks at embeddings, losses and gradients before anything moves; each look waits for the device.
`DeferredChecks` does not wait. What it finds stays on the device, where a *gate* keeps the optimisers still from the
first bad phase on. The host reads the findings one or two steps later and raises the same error; the parameters are
then those before the bad phase.

Not undone here: running statistics of BatchNorms that have taken in a bad batch. With immediate checks those are the
metric model's, with deferred checks also the graph's and those of the steps until the error; the same holds for epoch
averages. `gcahng.training.step_faults` puts back what a step that is left out has changed.

Several ranks raise together, at the same call: else one would leave while the others wait for it. Embeddings are those
of the global batch, which all have; about losses and gradients they tell each other once per pass, before anything
moves; and what deferred checks read when depends on the number of steps, not on the time that copies take.

Letters: B samples of the batch, W ranks.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from gcahng.distributed import ONE, Ranks
from gcahng.errors import TrainingError

# Steps that may be under way when another one begins: one that the device works on and one that waits for it. More
# would keep more batches in memory and gain nothing.
MOST_AHEAD = 2


@dataclass(frozen=True)
class Finding:
    """What was not finite.

    Attributes:
        what: Kind of number.
        reach: Pass in which it was met: "metric", "classifier" or "generation".
        part: Of a gradient.
        positions: Of the bad samples in the global batch, of embeddings.
    """

    what: Literal["embedding", "loss", "gradient"]
    reach: str
    part: str | None = None
    positions: tuple[int, ...] = ()


class NotFinite(TrainingError):
    """A number that training needs is NaN or infinite; nothing has moved by it.

    Attributes:
        step: Global step in which it was met.
        finding: What it is.
    """

    def __init__(self, step: int, message: str, finding: Finding) -> None:
        self.step = step
        self.finding = finding
        super().__init__(f"Step {step}: {message}")


class NonFiniteEmbedding(NotFinite):
    """Embeddings of a batch are NaN or infinite.

    Attributes:
        positions: Of the bad samples in the batch.
    """

    def __init__(self, step: int, positions: list[int]) -> None:
        self.positions = positions
        super().__init__(
            step,
            f"{len(positions)} embeddings of the batch are not finite, the first at position {positions[0]}; "
            "no parameter was moved. Check the images, or lower the learning rate.",
            Finding("embedding", "metric", positions=tuple(positions)),
        )


class FiniteChecks(Protocol):
    """What step and backend tell the checks; each method may raise `NotFinite`."""

    @property
    def gate(self) -> Tensor | None:
        """0-dim float32 on the device: 1 where nothing may move any more, else 0. None: checked at once."""

    def begin(self, step: int) -> None:
        """A step begins."""

    def embeddings(self, z: Tensor, whole: Tensor) -> None:
        """Its embeddings, (B, D), and which images they were made of are finite: (B,), not 0 where they are."""

    def loss(self, loss: Tensor, reach: str) -> None:
        """The loss of one pass, before its backward pass."""

    def gradients(self, parts: Mapping[str, Sequence[Tensor]], reach: str) -> None:
        """The gradients by part that the pass is about to move by; empty where a loss scaler checks them."""

    def settle(self) -> None:
        """Wait for everything known so far: something is about to move that obeys no gate."""

    def end(self) -> None:
        """The step has ended."""

    def finish(self) -> None:
        """Wait for all steps so far: the epoch ends, or a checkpoint or a log row is about to be written."""


class ImmediateChecks:
    """Looks at every number when it is told, before anything moves; several ranks at losses with the gradients."""

    gate: Tensor | None = None

    def __init__(self, ranks: Ranks = ONE) -> None:
        """
        Args:
            ranks: All that raise together.
        """
        self._step = 0
        self._ranks = ranks
        self._losses: dict[str, Tensor] = {}

    def begin(self, step: int) -> None:
        self._step = step
        self._losses.clear()

    def embeddings(self, z: Tensor, whole: Tensor) -> None:
        finite = torch.isfinite(z.detach()).all(1)
        if not bool(finite.all()):
            raise _bad_embeddings(self._step, finite.tolist(), whole.tolist())

    def loss(self, loss: Tensor, reach: str) -> None:
        if self._ranks.size > 1:
            self._losses[reach] = loss.detach()
        elif not bool(torch.isfinite(loss)):
            raise _bad_loss(self._step, float(loss.detach()), reach)

    def gradients(self, parts: Mapping[str, Sequence[Tensor]], reach: str) -> None:
        loss = self._losses.pop(reach, None)
        found = [0.0 if loss is None else float(loss)]
        found += [float(_largest(gradients)) if gradients else 0.0 for gradients in parts.values()]
        if self._ranks.size > 1:
            bad = self._ranks.host_max([float(not math.isfinite(value)) for value in found])
            found = [math.nan if b and math.isfinite(value) else value for b, value in zip(bad, found, strict=True)]
        if not math.isfinite(found[0]):
            raise _bad_loss(self._step, found[0], reach)
        for name, value in zip(parts, found[1:], strict=True):
            if not math.isfinite(value):
                raise _bad_gradients(self._step, name, reach)

    def settle(self) -> None:
        """Nothing is open."""

    def end(self) -> None:
        """Nothing is open."""

    def finish(self) -> None:
        """Nothing is open."""


@dataclass
class _Findings:
    """What one step has found, on the device.

    Attributes:
        step: Global step.
        rows: (2, B) bool: which embeddings and which images are finite; None before the forward pass.
        names: Pass and part of each value; part None is the pass's loss.
        values: 0-dim tensors: losses, and the largest absolute gradient of each part.
    """

    step: int
    rows: Tensor | None = None
    names: list[tuple[str, str | None]] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Arrival:
    """A step's findings on their way to the host.

    Attributes:
        step, names: As in `_Findings`.
        rows: B, or 0 if no embeddings were checked.
        numbers: (2 B + values,) in page-locked memory.
        event: Recorded behind the copy; None where the numbers are there already.
    """

    step: int
    names: tuple[tuple[str, str | None], ...]
    rows: int
    numbers: Tensor
    event: torch.cuda.Event | None

    @property
    def arrived(self) -> bool:
        return self.event is None or self.event.query()

    def fault(self) -> NotFinite | None:
        """The first bad number in the order of the step, or None; waits for the copy."""
        if self.event is not None:
            self.event.synchronize()
        numbers = host_numbers(self.numbers)
        embeddings, images = numbers[: self.rows], numbers[self.rows : 2 * self.rows]
        if not all(embeddings):
            return _bad_embeddings(self.step, embeddings, images)
        for (reach, part), number in zip(self.names, numbers[2 * self.rows :], strict=True):
            if not math.isfinite(number):
                return _bad_loss(self.step, number, reach) if part is None else _bad_gradients(self.step, part, reach)
        return None


class DeferredChecks:
    """Closes a gate on the device at the first bad number; the host learns of it later, without waiting.

    Optimisers that honour `found_inf` (torch's fused ones, as loss scalers use them) stay still while the gate is
    closed. Before others move, the findings so far are waited for.
    """

    def __init__(self, device: torch.device | str, ranks: Ranks = ONE) -> None:
        """
        Args:
            device: Where losses and gradients are.
            ranks: All whose gates close together.
        """
        self._ranks = ranks
        self.gate: Tensor = torch.zeros((), device=device)
        self._findings = _Findings(0)
        self._arrivals: deque[_Arrival] = deque()

    def begin(self, step: int) -> None:
        # When a copy arrives is another matter on each rank.
        alone = self._ranks.size == 1
        while self._arrivals and (len(self._arrivals) >= MOST_AHEAD or (alone and self._arrivals[0].arrived)):
            self._raise_if_bad(self._arrivals.popleft())
        self._findings = _Findings(step)

    def embeddings(self, z: Tensor, whole: Tensor) -> None:
        self._findings.rows = torch.stack([finite_rows(z), whole.bool()])
        self._require(self._findings.rows[0].all())

    def loss(self, loss: Tensor, reach: str) -> None:
        # The gate takes it in with the gradients, before which nothing moves.
        self._note(reach, None, loss.detach())

    def gradients(self, parts: Mapping[str, Sequence[Tensor]], reach: str) -> None:
        for name, gradients in parts.items():
            if gradients:
                self._note(reach, name, _largest(gradients))
        found = self._findings
        of_pass = [index for index, (of, _) in enumerate(found.names) if of == reach]
        if not of_pass:
            return
        values = torch.stack([found.values[index] for index in of_pass])
        good = torch.isfinite(values)
        if self._ranks.size > 1:
            here, good = good, self._ranks.sum((~good).float()) == 0
            values = values.masked_fill(here & ~good, math.nan)
            for index, value in zip(of_pass, values.unbind(), strict=True):
                found.values[index] = value
        self._require(good.all())

    def settle(self) -> None:
        self.finish()
        arrival = self._send()
        if arrival is not None:
            self._raise_if_bad(arrival)

    def end(self) -> None:
        arrival = self._send()
        if arrival is not None:
            self._arrivals.append(arrival)
        self._findings = _Findings(self._findings.step)

    def finish(self) -> None:
        while self._arrivals:
            self._raise_if_bad(self._arrivals.popleft())

    def _note(self, reach: str, part: str | None, value: Tensor) -> None:
        self._findings.names.append((reach, part))
        self._findings.values.append(value)

    def _require(self, good: Tensor) -> None:
        self.gate.masked_fill_(~good, 1.0)

    def _send(self) -> _Arrival | None:
        """Start the way of the step's findings to the host; None if there are none."""
        found = self._findings
        pieces = [value[None] for value in found.values]
        if found.rows is not None:
            pieces.insert(0, found.rows.flatten())
        if not pieces:
            return None
        # In double: a finite loss or gradient must not become infinite on the way.
        numbers, event = _to_host(torch.cat([piece.double() for piece in pieces]))
        rows = 0 if found.rows is None else found.rows.shape[1]
        return _Arrival(found.step, tuple(found.names), rows, numbers, event)

    def _raise_if_bad(self, arrival: _Arrival) -> None:
        fault = arrival.fault()
        if fault is not None:
            # Steps behind the bad one have moved nothing and are forgotten: who catches the error may go on.
            self._arrivals.clear()
            self._findings = _Findings(self._findings.step)
            self.gate.zero_()
            raise fault


def finite_rows(x: Tensor) -> Tensor:
    """(B,) whether the entries of each row of x, (B, ...), are all finite; reads x once and makes no copy of it."""
    if not x.is_floating_point():
        return torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    # The maximum of absolute values is NaN or infinite if one of them is.
    norms = torch.linalg.vector_norm(x.detach()[:, None], math.inf, dim=tuple(range(1, x.dim() + 1)))
    return torch.isfinite(norms)


def host_numbers(values: Tensor) -> list[float]:
    """The numbers of a tensor that lies in the host's memory."""
    numbers: list[float] = values.tolist()
    return numbers


def _largest(gradients: Sequence[Tensor]) -> Tensor:
    """0-dim largest absolute gradient; NaN if one is NaN."""
    return torch.stack(torch._foreach_norm(list(gradients), ord=math.inf)).amax()


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy in the host's memory, and an event behind it if it is still on its way."""
    if values.device.type == "cpu":
        return values, None
    numbers = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    numbers.copy_(values, non_blocking=True)
    return numbers, torch.cuda.current_stream(values.device).record_event()


def _bad_embeddings(step: int, finite: Sequence[float], whole_images: Sequence[float]) -> NonFiniteEmbedding:
    # A norm over the batch spreads one bad image to every embedding: name the images that are bad themselves.
    good = finite if all(whole_images) else whole_images
    return NonFiniteEmbedding(step, [position for position, fine in enumerate(good) if not fine])


def _bad_loss(step: int, value: float, reach: str) -> NotFinite:
    return NotFinite(
        step,
        f"The {reach} loss is {value}; no parameter was moved in this phase. "
        "Lower the learning rate, or train with precision fp32.",
        Finding("loss", reach),
    )


def _bad_gradients(step: int, part: str, reach: str) -> NotFinite:
    return NotFinite(
        step,
        f"Gradients of `{part}` are not finite in the {reach} pass; no parameter was moved. "
        "Lower the learning rate, or train with precision fp32.",
        Finding("gradient", reach, part),
    )
