"""What a step adds up over its micro-batches and over all workers, the same for any number of workers.

Each micro-batch has a line of float64, filled by the worker that computed it and zero with all others: adding the workers'
tables is then exact, and the lines are added up in their order.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class Table:
    """Lines with named columns, each of one or more numbers."""

    def __init__(self, lines: int, **sizes: int) -> None:
        self._sizes = sizes
        self._whole = torch.zeros(lines, sum(sizes.values()), dtype=torch.float64)
        self._columns = self._parted(self._whole)

    def put(self, line: int, **values: Tensor | float) -> None:
        """Fill columns of a line; each value has as many numbers as its column, or is one for all of them."""
        for name, value in values.items():
            self._columns[name][line] = torch.as_tensor(value)

    def add_up(self, device: torch.device) -> None:
        """Add all workers' tables, over the network of `device`."""
        there = self._whole.to(device)
        dist.all_reduce(there)
        self._whole.copy_(there)

    def lines(self, name: str) -> Tensor:
        """A column, float64 [lines, size]."""
        return self._columns[name]

    def sums(self) -> dict[str, Tensor]:
        """The lines added one after the other, by column: float64 [size]."""
        total = torch.zeros_like(self._whole[0])
        for line in self._whole:
            total += line
        return self._parted(total)

    def _parted(self, numbers: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._sizes, numbers.split(list(self._sizes.values()), dim=-1), strict=True))
