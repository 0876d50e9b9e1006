"""Inner loops of the edge stage: one class per way to run them, all with the methods of `EagerKernels`."""

from gcahng.graph.kernels.eager import EagerKernels, HiddenWeights, NormWeights

__all__ = ["EagerKernels", "HiddenWeights", "NormWeights"]
