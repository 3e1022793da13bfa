"""Building blocks of the latent coder. Attribute names are keys of the official weights.

Plain convolutions come from compressai. Its residual blocks are not these ones: they end in GDN, and
the official networks in a leaky rectifier.

Shape suffixes: B images, C channels, h w any grid, P channels of the guiding feature.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dicmh_ray.codec.icmh.compressai_parts import conv1x1, conv3x3, deconv


class ResidualStride(nn.Module):
    """Halves the grid: two 3x3 convolutions beside a 1x1 one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride=2)
        self.conv2 = conv3x3(outputs, outputs)
        self.downsample = conv1x1(inputs, outputs, stride=2)

    def forward(self, x_BChw: Tensor) -> Tensor:
        branch = self.conv2(F.leaky_relu(self.conv1(x_BChw), 0.01))
        return F.leaky_relu(branch, 0.1) + self.downsample(x_BChw)


class ResidualUpsample(nn.Module):
    """Doubles the grid: a sub-pixel and a 3x3 convolution beside a sub-pixel one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.subpel_conv = _subpixel1x1(inputs, outputs)
        self.conv = conv3x3(outputs, outputs)
        self.upsample = _subpixel1x1(inputs, outputs)

    def forward(self, x_BChw: Tensor) -> Tensor:
        branch = self.conv(F.leaky_relu(self.subpel_conv(x_BChw), 0.01))
        return F.leaky_relu(branch, 0.1) + self.upsample(x_BChw)


class ResidualBottleneck(nn.Module):
    """Adds a 3x3 convolution at half the channels, between two 1x1 ones."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv1x1(channels, half),
            nn.GELU(),
            conv3x3(half, half),
            nn.GELU(),
            conv1x1(half, channels),
        )

    def forward(self, x_BChw: Tensor) -> Tensor:
        return x_BChw + self.branch(x_BChw)


class FeatureTransform(nn.Module):
    """SFT: a guiding feature says how each value is scaled and shifted."""

    def __init__(self, channels: int, prior: int, shared: int) -> None:
        super().__init__()
        self.mlp_shared = nn.Sequential(conv3x3(prior, shared), nn.LeakyReLU(0.2))
        self.mlp_gamma = conv3x3(shared, channels)
        self.mlp_beta = conv3x3(shared, channels)

    def forward(self, x_BChw: Tensor, prior_BPhw: Tensor) -> Tensor:
        """The feature may lie on another grid; it is averaged to that of ``x``."""
        if prior_BPhw.shape[2:] != x_BChw.shape[2:]:
            height, width = x_BChw.shape[2:]
            prior_BPhw = F.adaptive_avg_pool2d(prior_BPhw, (height, width))
        shared = self.mlp_shared(prior_BPhw)
        return x_BChw * (1 + self.mlp_gamma(shared)) + self.mlp_beta(shared)


class ResidualTransform(nn.Module):
    """Transform, leaky rectifier and 3x3 convolution, twice, under one guiding feature."""

    def __init__(self, channels: int, prior: int, shared: int) -> None:
        super().__init__()
        self.conv_0 = conv3x3(channels, channels)
        self.norm_0 = FeatureTransform(channels, prior, shared)
        self.conv_1 = conv3x3(channels, channels)
        self.norm_1 = FeatureTransform(channels, prior, shared)

    def forward(self, x_BChw: Tensor, prior_BPhw: Tensor) -> Tensor:
        out = self.conv_0(F.leaky_relu(self.norm_0(x_BChw, prior_BPhw), 0.2))
        out = self.conv_1(F.leaky_relu(self.norm_1(out, prior_BPhw), 0.2))
        return x_BChw + out


class ChannelContext(nn.Module):
    """What the slices that are already coded say about the next one."""

    def __init__(self, inputs: int, hidden: tuple[int, int], outputs: int) -> None:
        super().__init__()
        # The official spelling is a key.
        self.fushion = nn.Sequential(
            conv5x5(inputs, hidden[0]),
            nn.GELU(),
            conv5x5(hidden[0], hidden[1]),
            nn.GELU(),
            conv5x5(hidden[1], outputs),
        )

    def forward(self, y_hat_BChw: Tensor) -> Tensor:
        return self.fushion(y_hat_BChw)


class EntropyParameters(nn.Module):
    """Scales and means from all contexts, position by position."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        first, second = outputs * 5 // 3, outputs * 4 // 3
        self.fusion = nn.Sequential(
            conv1x1(inputs, first),
            nn.GELU(),
            conv1x1(first, second),
            nn.GELU(),
            conv1x1(second, outputs),
        )

    def forward(self, contexts_BChw: Tensor) -> Tensor:
        return self.fusion(contexts_BChw)


def conv5x5(inputs: int, outputs: int) -> nn.Conv2d:
    """A 5x5 convolution on the same grid."""
    return nn.Conv2d(inputs, outputs, 5, padding=2)


def guide(inputs: int, prior: int, stride: int = 1) -> nn.Sequential:
    """The next guiding feature, on the same grid or half of it."""
    return nn.Sequential(conv3x3(inputs, prior, stride=stride), nn.GELU(), conv1x1(prior, prior))


def guide_up(prior: int) -> nn.Sequential:
    """The next guiding feature, on the grid twice as fine."""
    return nn.Sequential(
        deconv(prior, prior, kernel_size=3, stride=2), nn.GELU(), conv1x1(prior, prior)
    )


def joint_guide(inputs: int, prior: int) -> nn.Sequential:
    """A guiding feature made from another one and the latent together."""
    return nn.Sequential(
        conv3x3(inputs, 4 * prior),
        nn.GELU(),
        conv3x3(4 * prior, 2 * prior),
        nn.GELU(),
        conv3x3(2 * prior, prior),
    )


def round_through(x: Tensor) -> Tensor:
    """Rounds half to even; the gradient passes as if it did not."""
    # Zero plus the rounded value: exactly that value, which x + (round(x) - x) need not be.
    return (x - x.detach()) + torch.round(x).detach()


def _subpixel1x1(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(conv1x1(inputs, 4 * outputs), nn.PixelShuffle(2))
