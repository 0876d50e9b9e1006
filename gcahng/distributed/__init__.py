"""What processes say to each other: the gathered batch, sums over ranks, statistics of all ranks, shared failures.

The gradient rule, for everything in here and all that builds on it
-------------------------------------------------------------------
Every rank computes the same losses of the same global batch. What is differentiated is the sum of all ranks' losses,
W times the loss: the backward pass of each collective is its transpose (a sum over ranks passes back the sum of the
ranks' gradients, a gather passes back to each rank the sum of what all ranks have for its rows). At the end gradients
of parameters are averaged over ranks, as DDP and ZeRO do by themselves, which divides by W. So, without one factor of
W anywhere in the maths:

- parameters that all ranks apply to the same tensors (classifier, proxies, the nodes' part of the graph) have the whole
  gradient on every rank, or parts that average to it;
- parameters that a rank applies to its own images or its own block pairs have W times the part of that rank;
- parameters of which each rank holds its own rows (class shards) have W times their gradient and no average: they are
  divided by W where they live (`class_shards`).

Letters: W ranks, B = P * K samples of the global batch group-major, P_r classes of rank r.
"""

from gcahng.distributed.ranks import ONE, Ranks

__all__ = ["ONE", "Ranks"]
