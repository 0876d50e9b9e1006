"""The generator network of HDML: from an embedding back to a feature, the input of the embedding head.

HDML is Zheng et al., "Hardness-Aware Deep Metric Learning", CVPR 2019. All is taken from the authors' released code
(github.com/wzzheng/HDML), not from the paper's text: `main_npair.py` builds the network out of `fc_block` of
`lib/nn_Ops.py`, D -> 512 -> feature channels; behind the hidden layer ReLU, then BatchNorm; nothing behind the last.

It differs from the released code in one thing: BatchNorm takes its statistics of the B real embeddings of the batch,
there of real and interpolated ones together. See `row_map` for why.

Letters: B samples of the batch, D channels of embeddings, C of features.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.errors import InputError
from gcahng.generation.row_map import Affine, Normalise, RowFunction, RowMap

# Hidden width: released code of HDML, `main_npair.py`, in_d=embedding_size, out_d=512, for 1024 feature channels.
HDML_HIDDEN = (512,)
# Added to the variance: the default of tf.layers.batch_normalization (TensorFlow 1.10), which the released code calls
# without one.
HDML_EPS = 1e-3


class FeatureGenerator(nn.Module):
    """Fully connected layers; `on_batch` makes them a function of single rows.

    Args:
        dim: D.
        num_features: C.
        hidden: Widths of the hidden layers; HDML has one of 512.

    Attributes:
        hidden: The hidden Linears.
        norms: Their BatchNorms' weights and biases; statistics are never kept.
        last: The Linear to the features.

    Raises:
        InputError: A width is below 1.
    """

    def __init__(self, dim: int, num_features: int, hidden: Sequence[int] = HDML_HIDDEN) -> None:
        super().__init__()
        widths = [dim, *hidden, num_features]
        if min(widths) < 1:
            raise InputError(f"`hidden`, `dim` and `num_features` must be at least 1: got {widths}.")
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:-1], strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm1d(b, HDML_EPS, track_running_stats=False) for b in hidden)
        self.last = nn.Linear(widths[-2], num_features)
        for layer in (*self.hidden, self.last):
            # Released code of HDML, `weight_variable` and `bias_variable` of `lib/nn_Ops.py`: Glorot uniform and zero.
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def on_batch(self, z: Tensor, *, constant: bool = False) -> RowMap:
        """The generator with BatchNorm statistics of the real embeddings `z`, (B, D): (R, D) -> (R, C).

        Args:
            z: Gradient flows to it through the statistics, for the network is differentiated as it is.
            constant: Without gradient to the parameters.
        """
        steps: list[RowFunction] = []
        batch = z
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            weight, bias, scale, shift = _tensors((linear, norm), constant)
            affine = Affine(weight, bias)
            batch = F.relu(affine(batch))
            normalise = Normalise.of_batch(batch, scale, shift, HDML_EPS)
            batch = normalise(batch)
            steps += [affine, F.relu, normalise]
        steps.append(Affine(*_tensors((self.last,), constant)))
        return RowMap(tuple(steps), max(p.shape[0] for p in self.parameters()))

    def forward(self, z: Tensor) -> Tensor:
        """(B, C) features of real embeddings (B, D)."""
        return self.on_batch(z)(z)


def _tensors(modules: Sequence[nn.Module], constant: bool) -> list[Tensor]:
    """Weight and bias of each."""
    found = [tensor for module in modules for tensor in (module.weight, module.bias)]
    tensors = [tensor for tensor in found if isinstance(tensor, Tensor)]
    return [tensor.detach() for tensor in tensors] if constant else tensors
