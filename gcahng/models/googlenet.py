"""GoogLeNet from torchvision, which timm lacks.

torchvision takes seconds to import: it is imported when the network is asked for.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from gcahng.models.backbone import Backbone

# The project normalises images by ImageNet's statistics; the published weights, which come from
# TensorFlow, expect a mean and a deviation of 0.5 instead.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class GoogLeNetBackbone(Backbone):
    """torchvision's GoogLeNet up to its last inception block, without auxiliary heads.

    Parameter names are torchvision's, so that its published weights fit. The random start is
    PyTorch's: torchvision's own draws truncated normals and takes two seconds.

    Args:
        transform_input: Bring images from ImageNet's mean and deviation to 0.5 and 0.5, as
            torchvision does for its published weights.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, transform_input: bool = True) -> None:
        from torchvision.models import googlenet

        whole = googlenet(weights=None, aux_logits=False, transform_input=False, init_weights=False)
        stages = OrderedDict(whole.named_children())
        while next(reversed(stages)) != "inception5b":  # average pool, dropout, fc
            stages.popitem()
        super().__init__(nn.Sequential(stages), num_features=1024)
        self.transform_input = transform_input
        mean, std = torch.tensor(_MEAN).view(3, 1, 1), torch.tensor(_STD).view(3, 1, 1)
        self.register_buffer("scale", std / 0.5, persistent=False)
        self.register_buffer("shift", (mean - 0.5) / 0.5, persistent=False)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the map (B, 1024, H / 32, W / 32)."""
        if self.transform_input:
            images = images * self.scale + self.shift
        return super().forward_features(images)


def download_googlenet() -> dict[str, Tensor]:
    """The state dictionary of torchvision's ImageNet V1 weights, from its cache or its server."""
    from torchvision.models import GoogLeNet_Weights

    weights = GoogLeNet_Weights.IMAGENET1K_V1
    return dict(weights.get_state_dict(progress=False, check_hash=True))
