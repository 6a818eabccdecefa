"""The networks that tutorials about ResNet build, as their readers would type them.

Their habits differ from torchvision's on purpose: biased convolutions, shortcuts without a batch
norm, functional ReLUs, plain Sequentials, one input channel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """d2l's block: biased 3x3 convolutions, and a bare 1x1 convolution as the shortcut."""

    def __init__(self, in_channels, out_channels, use_1x1conv=False, stride=1):
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, stride=stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
        )
        shortcut = [nn.Conv2d(in_channels, out_channels, 1, stride=stride)] if use_1x1conv else []
        self.res = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        out = out + self.res(x)
        return F.relu(out)


def d2l_resnet(num_classes=10, in_channels=1):
    """ResNet-34's layout as one Sequential, for Fashion-MNIST at 224x224."""

    def stage(blocks, ins, outs, down=False):
        first = Residual(ins, outs, use_1x1conv=down, stride=2 if down else 1)
        return nn.Sequential(first, *(Residual(outs, outs) for _ in range(blocks - 1)))

    stem = nn.Sequential(
        nn.Conv2d(in_channels, 64, 7, stride=2, padding=3),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
    return nn.Sequential(
        stem,
        stage(3, 64, 64),
        stage(4, 64, 128, down=True),
        stage(6, 128, 256, down=True),
        stage(3, 256, 512, down=True),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(512, num_classes),
    )


class ResBlock(nn.Module):
    """The MNIST tutorial's block, whose residual can be left out to show what it does."""

    def __init__(self, in_channels, out_channels, stride=1, use_residual=True):
        super().__init__()
        self.use_residual = use_residual
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.use_1x1conv = in_channels != out_channels or stride != 1
        if self.use_1x1conv:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        if self.use_1x1conv:
            self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, inputs: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(inputs)))
        y = self.bn2(self.conv2(y))
        if self.use_residual:
            shortcut = self.bn3(self.shortcut(inputs)) if self.use_1x1conv else inputs
            y = torch.add(shortcut, y)
        return F.relu(y)


class MnistResNet18(nn.Module):
    """ResNet-18 for 32x32 digits, the modules kept in one Sequential called ``net``."""

    def __init__(self, in_channels=1, num_classes=10, use_residual=True, width=64):
        super().__init__()
        stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 7, stride=2, padding=3),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )

        def stage(ins, outs, stride):
            first = ResBlock(ins, outs, stride, use_residual)
            return nn.Sequential(first, ResBlock(outs, outs, use_residual=use_residual))

        self.net = nn.Sequential(
            stem,
            stage(width, width, 1),
            stage(width, 2 * width, 2),
            stage(2 * width, 4 * width, 2),
            stage(4 * width, 8 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def batch_norm_by_hand(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps):
    """The four steps of the theory tutorial, in float64, for one (N, C, H, W) tensor."""
    shape = (1, -1, 1, 1)
    centred = x.double() - mean.double().view(shape)
    normalised = centred / (var.double().view(shape) + eps).sqrt()
    return normalised * gamma.double().view(shape) + beta.double().view(shape)
