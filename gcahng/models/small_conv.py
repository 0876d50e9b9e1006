"""A small residual network for small images (glyphs, characters, 32 pixels)."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.errors import ConfigError


class SmallConv(nn.Module):
    """Conv-BatchNorm-ReLU stem at full resolution, then one halving residual block per width.

    With the default widths: 0.3 million parameters and 11.5 million multiply-adds for an image of
    32 x 32, whose feature map is 4 x 4.

    Args:
        in_channels: Channels of an image.
        widths: Channels of the stem and of each block; the last one is `num_features`.
    Raises:
        ConfigError: no widths, or a width or channel count below 1.
    """

    def __init__(self, in_channels: int = 3, widths: Sequence[int] = (16, 32, 64, 128)) -> None:
        super().__init__()
        sizes = [in_channels, *widths]
        if len(sizes) < 2 or any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ConfigError(
                "small_conv needs `in_channels` and at least one entry in `widths`, all of them "
                f"whole numbers of at least 1: got in_channels={in_channels!r}, "
                f"widths={list(widths)!r}. Change model.backbone_args."
            )
        self.num_features = sizes[-1]
        self.stem = _conv_block(in_channels, sizes[1], stride=1)
        self.blocks = nn.Sequential(
            *(_HalvingBlock(narrow, wide) for narrow, wide in zip(sizes[1:-1], sizes[2:], strict=True))
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) to a map (B, widths[-1], H / 2**n, W / 2**n), n blocks."""
        # With channels last a third of the convolutions' time could be saved on CPU, but BatchNorm there adds up
        # thousands of float32 numbers one after the other: its variance is then off by 1e-4.
        features: Tensor = self.blocks(self.stem(images.contiguous()))
        return features


def _conv_block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class _HalvingBlock(nn.Module):
    """Two convolutions, the first with stride 2, beside an averaged and projected skip."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.reduce = _conv_block(in_channels, out_channels, stride=2)
        self.mix = nn.Sequential(
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        # An odd side rounds up in the strided convolution, so it must round up here.
        self.skip = nn.Sequential(
            nn.AvgPool2d(2, ceil_mode=True),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.mix(self.reduce(x)) + self.skip(x), inplace=True)
