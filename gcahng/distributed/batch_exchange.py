"""What every rank must know of a step's batch before tensors are exchanged: its labels, and that it is as planned.

A gather of parts that are not of the agreed sizes aborts a process without a word, or hangs; so does a BatchNorm over
all ranks while one of them fails at an image of another size. So each step begins with one small message between the
ranks' CPUs, before anything else that could fail on one rank alone.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gcahng.distributed.ranks import Ranks
from gcahng.errors import InputError

# Step, rows, labels, number of dimensions of a row, the first four of them.
HEADER = 8
DIMENSIONS = 4


class BatchExchange:
    """One step's message; made at the start of the step."""

    def __init__(
        self,
        ranks: Ranks,
        labels: Tensor,
        shape: Sequence[int],
        class_counts: Sequence[int],
        num_samples: int,
        step: int,
    ) -> None:
        """Tell all ranks of this rank's part, and look at theirs; all ranks come here together.

        Args:
            ranks: All ranks.
            labels: (K * P_r,) int64 of this rank, group-major; best on the CPU.
            shape: Of this rank's images.
            class_counts: (W,) classes of each rank, as planned.
            num_samples: K.
            step: Global step; all ranks must be at the same one.
        Raises:
            InputError: A rank's part is not what the plan says; the same error on every rank, with all shapes.
        """
        self.ranks = ranks
        self.class_counts = tuple(class_counts)
        self.num_samples = num_samples
        self.own = labels
        if ranks.size == 1:
            return
        flat = labels.detach().reshape(-1).cpu()
        dimensions = list(shape[1 : 1 + DIMENSIONS])
        header = [step, shape[0], flat.numel(), len(shape) - 1, *dimensions]
        message = torch.zeros(HEADER + num_samples * max(self.class_counts), dtype=torch.int64)
        message[: len(header)] = torch.tensor(header)
        kept = min(flat.numel(), message.numel() - HEADER)
        message[HEADER : HEADER + kept] = flat[:kept]
        self._messages = message.new_empty(ranks.size, message.numel())
        dist.all_gather_into_tensor(self._messages.view(-1), message, group=ranks.host_group)
        self._check()

    def labels(self) -> Tensor:
        """(K * P,) int64 labels of the global batch, group-major, on the CPU; the given ones on one rank."""
        if self.ranks.size == 1:
            return self.own
        parts = [
            message[HEADER : HEADER + self.num_samples * count].view(self.num_samples, count)
            for message, count in zip(self._messages, self.class_counts, strict=True)
        ]
        return torch.cat(parts, 1).flatten()

    def _check(self) -> None:
        headers = self._messages[:, :HEADER].tolist()
        wanted = [self.num_samples * count for count in self.class_counts]
        first = headers[0]
        good = all(
            header[0] == first[0] and header[1] == header[2] == rows and header[3:] == first[3:]
            for header, rows in zip(headers, wanted, strict=True)
        )
        if good:
            return
        lines = []
        for rank, (header, rows) in enumerate(zip(headers, wanted, strict=True)):
            step, images, labels, dimensions, *sizes = header
            shape = _shape(images, dimensions, sizes)
            lines.append(f"\n  rank {rank}: step {step}, images {shape}, {labels} labels, planned {rows}")
        raise InputError(
            "The ranks' batches are not as planned: expected of every rank the same step, as many images and labels as "
            f"planned, and images of one size, got{''.join(lines)}\nGive every rank its part of the same batch plan "
            "(`gcahng.data.loader.TrainLoader` with `rank` and `world_size`)."
        )


def _shape(rows: int, dimensions: int, sizes: Sequence[int]) -> str:
    known = [str(size) for size in sizes[: min(dimensions, DIMENSIONS)]]
    return f"({', '.join([str(rows), *known])}{', ...' if dimensions > DIMENSIONS else ''})"
