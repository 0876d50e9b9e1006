"""What the graph network gives back.

Letters: B samples, D channels, N training classes.
"""

from dataclasses import dataclass

from torch import Tensor

from gcahng.errors import InputError
from gcahng.graph.coefficients import Coefficients, full_table


@dataclass(frozen=True)
class GraphOutput:
    """What the graph says about a batch.

    Attributes:
        node_features: (B, D) nodes behind the node norm: what their classes are told from.
        class_scores: (B, N) of the nodes; None where the node classifier has been taken.
        coefficients: Pull coefficients by blocks, as the generation stage takes them; None if not asked for.
    """

    node_features: Tensor
    class_scores: Tensor | None
    coefficients: Coefficients | None

    @property
    def node_logits(self) -> Tensor:
        """(B, N) class scores of the nodes.

        Raises:
            InputError: There are none.
        """
        if self.class_scores is None:
            raise InputError("The graph has no node classifier: who took it scores `node_features` with it.")
        return self.class_scores

    @property
    def pull_coefficients(self) -> Tensor:
        """(B, B, D) in (0, 1): how far negative j keeps from anchor i, channel by channel.

        Raises:
            InputError: There are none, or only those of some pairs.
        """
        return full_table(self.coefficients)
