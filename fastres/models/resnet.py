"""Residual networks with torchvision's names, arguments, state_dict keys and initial values.

He et al., "Deep Residual Learning for Image Recognition" (https://arxiv.org/abs/1512.03385):
ResNet-18 to 152 for ImageNet and ResNet-20 to 110 for CIFAR. Xie et al., "Aggregated Residual
Transformations" (https://arxiv.org/abs/1611.05431): ResNeXt. Zagoruyko and Komodakis, "Wide
Residual Networks" (https://arxiv.org/abs/1605.07146): the wide variants.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.live import LiveModule

NormLayer = Callable[..., nn.Module]


def conv3x3(
    inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """3x3 convolution without bias whose padding keeps the image size at stride 1."""
    return nn.Conv2d(
        inplanes, planes, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False
    )


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(inplanes, planes, 1, stride, bias=False)


class ZeroPadShortcut(nn.Module):
    """The paper's option A: every ``stride``-th pixel, and zeros for the channels that are new.

    (N, inplanes, H, W) -> (N, planes, ceil(H/stride), ceil(W/stride)); no parameters. The zeros
    are split over both ends of the channels, as the public CIFAR checkpoints expect.
    """

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (planes - inplanes) // 2
        self.after = planes - inplanes - self.before

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, [0, 0, 0, 0, self.before, self.after])

    def extra_repr(self) -> str:
        return f"stride={self.stride}, zeros={self.before}+{self.after}"


class BasicBlock(nn.Module):
    """relu(x + bn2(conv2(relu(bn1(conv1(x)))))) with two 3x3 convolutions; the first is strided.

    (N, inplanes, H, W) -> (N, planes, H/stride, W/stride). The arguments are torchvision's.

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: stride of the first convolution and of the shortcut.
        downsample: the shortcut's module; None for the input itself.
        groups: 1; this block has no other.
        base_width: 64; this block has no other.
        dilation: dilation of the first convolution.
        norm_layer: makes the norms; None for ``nn.BatchNorm2d``.
        out_dilation: dilation of the second convolution; None for that of the first.

    Raises:
        ValueError: another number of groups or another base width.
    """

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        out_dilation: int | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError(
                "BasicBlock only supports groups=1 and base_width=64, "
                f"got groups={groups} and base_width={base_width}"
            )
        self.conv1 = conv3x3(inplanes, planes, stride, dilation=dilation)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes, dilation=out_dilation or dilation)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride
        self.residual = True

    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))

        if self.downsample is not None:
            identity = self.downsample(x)
        if self.residual:
            out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3, 1x1 expand, each with a batch norm, around an identity shortcut.

    (N, inplanes, H, W) -> (N, 4 * planes, H/stride, W/stride). The arguments are torchvision's.

    Args:
        inplanes: channels of the input.
        planes: channels of the 3x3 convolution, for 64 channels of base width and one group.
        stride: stride of the block and of its shortcut.
        downsample: the shortcut's module; None for the input itself.
        groups: groups of the 3x3 convolution.
        base_width: the 3x3 convolution has ``planes * base_width / 64 * groups`` channels.
        dilation: dilation of the 3x3 convolution before the stride takes effect.
        norm_layer: makes the norms; None for ``nn.BatchNorm2d``.
        out_dilation: dilation after the stride; None for ``dilation``.
        stride_on: the convolution with the stride: ``"3x3"`` (v1.5, torchvision) or ``"1x1"``
            (v1, the paper).

    Raises:
        ValueError: another ``stride_on``.
    """

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        out_dilation: int | None = None,
        stride_on: str = "3x3",
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        _check_choice("stride_on", stride_on, ("3x3", "1x1"))
        width = int(planes * (base_width / 64.0)) * groups
        if stride_on == "1x1":
            stride1, stride2, dilation = stride, 1, out_dilation or dilation
        else:
            stride1, stride2 = 1, stride
        self.conv1 = conv1x1(inplanes, width, stride1)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride2, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self.residual = True

    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))

        if self.downsample is not None:
            identity = self.downsample(x)
        if self.residual:
            out += identity
        return self.relu(out)


class ResNet(LiveModule):
    """A residual network: stem, up to four stages of blocks, global average pool, classifier.

    (N, in_chans, H, W) floating-point images -> (N, num_classes) logits. The network is live: in
    eval mode and without gradients it runs fused, with the weights that it has at each call.

    Args:
        block: :class:`BasicBlock`, :class:`Bottleneck` or a class with their arguments.
        layers: number of blocks of each stage, 1 to 4 numbers; a stage without blocks is an empty
            ``nn.Sequential``.
        num_classes: length of the logits; 0 returns the pooled features.
        zero_init_residual: start each block as its shortcut.
        groups: groups of the 3x3 convolutions of a Bottleneck.
        width_per_group: channels of each group in the first stage.
        replace_stride_with_dilation: for each of the last three stages, whether its stride becomes
            a dilation; None for no stage.
        norm_layer: makes the norms; None for ``nn.BatchNorm2d``.
        in_chans: channels of the images.
        planes: width of the first stage; each later stage has twice the width of the one before.
        stem: ``"imagenet"`` (7x7 stride 2, max pool) or ``"cifar"`` (3x3 stride 1, no pool).
        stride_on: the strided convolution of a Bottleneck, ``"3x3"`` (v1.5, torchvision) or
            ``"1x1"`` (v1, the paper).
        shortcut: where shapes differ, ``"B"`` projects by a 1x1 convolution and ``"A"`` pads with
            zeros.
        residual: whether blocks add their shortcut; without it the network is a plain one.
        backend: what may compute inference, ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: a value that is not one of these; the message names the argument.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        *,
        in_chans: int = 3,
        planes: int = 64,
        stem: str = "imagenet",
        stride_on: str = "3x3",
        shortcut: str = "B",
        residual: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(backend)
        _check_choice("stem", stem, ("imagenet", "cifar"))
        _check_choice("stride_on", stride_on, ("3x3", "1x1"))
        _check_choice("shortcut", shortcut, ("A", "B"))
        _check_at_least("in_chans", in_chans, 1)
        _check_at_least("planes", planes, 1)
        _check_at_least("num_classes", num_classes, 0)
        if not 1 <= len(layers) <= 4:
            raise ValueError(f"layers must have 1 to 4 entries, got {layers!r}")
        if stride_on == "1x1" and issubclass(block, BasicBlock):
            raise ValueError(
                "stride_on='1x1' needs a Bottleneck: a BasicBlock has no 1x1 to stride"
            )
        dilate = replace_stride_with_dilation
        if dilate is None:
            dilate = (False, False, False)
        if len(dilate) != 3:
            raise ValueError(
                "replace_stride_with_dilation should be None "
                f"or a 3-element tuple, got {replace_stride_with_dilation}"
            )

        self._norm_layer = norm_layer or nn.BatchNorm2d
        self._stride_on = stride_on
        self._shortcut = shortcut if residual else None
        self.inplanes = planes
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group

        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_chans, planes, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = conv3x3(in_chans, planes)
        self.bn1 = self._norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()

        depth1, depth2, depth3, depth4 = (*layers, 0, 0, 0)[:4]
        self.layer1 = self._make_layer(block, planes, depth1)
        self.layer2 = self._make_layer(block, planes * 2, depth2, stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, planes * 4, depth3, stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, planes * 8, depth4, stride=2, dilate=dilate[2])

        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.pooled = True
        self.num_features, self.num_classes = self.inplanes, num_classes
        self.fc = _classifier(self.num_features, num_classes)
        self._init_weights(zero_init_residual)

    def _make_layer(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        """One stage: ``blocks`` blocks, the first of which may stride and widen."""
        if blocks == 0:
            return nn.Sequential()
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        outplanes = planes * block.expansion
        downsample = self._make_shortcut(outplanes, stride)

        # Blocks written for torchvision know only its arguments: ours are passed where they matter.
        options: dict[str, Any] = {}
        if self._stride_on != "3x3":
            options["stride_on"] = self._stride_on
        first_options = dict(options)
        if dilate and (options or issubclass(block, BasicBlock)):
            first_options["out_dilation"] = self.dilation

        width = (self.groups, self.base_width)
        norm = self._norm_layer
        first = (self.inplanes, planes, stride, downsample, *width, first_dilation, norm)
        other = (outplanes, planes, 1, None, *width, self.dilation, norm)
        stage = [block(*first, **first_options)]
        stage += [block(*other, **options) for _ in range(1, blocks)]
        if self._shortcut is None:
            for made in stage:
                made.residual = False
        self.inplanes = outplanes
        return nn.Sequential(*stage)

    def _make_shortcut(self, outplanes: int, stride: int) -> nn.Module | None:
        if self._shortcut is None or (stride == 1 and self.inplanes == outplanes):
            return None
        if self._shortcut == "A":
            return ZeroPadShortcut(self.inplanes, outplanes, stride)
        return nn.Sequential(conv1x1(self.inplanes, outplanes, stride), self._norm_layer(outplanes))

    def _init_weights(self, zero_init_residual: bool) -> None:
        """He initialisation; with ``zero_init_residual`` every block starts as its shortcut."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and module.affine:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        if not zero_init_residual:
            return
        for module in self.modules():
            if isinstance(module, Bottleneck) and isinstance(module.bn3.weight, Tensor):
                nn.init.zeros_(module.bn3.weight)
            elif isinstance(module, BasicBlock) and isinstance(module.bn2.weight, Tensor):
                nn.init.zeros_(module.bn2.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> the last stage's feature map (N, num_features, h, w)."""
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self.layer4(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last stage's feature map -> logits, or what the classifier reads: pooled features."""
        if self.pooled:
            x = self.avgpool(x)
            x = torch.flatten(x, 1)
        return x if pre_logits else self.fc(x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.unused
    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The classifier, which turns pooled features into logits; or its name."""
        return "fc" if name_only else self.fc

    @torch.jit.unused
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new, freshly initialised classifier in place; 0 leaves the pooled features.

        Args:
            num_classes: length of the logits; 0 for no classifier.
            global_pool: ``"avg"``, or ``""`` for the feature map as it is, which needs
                ``num_classes=0``; None keeps the pooling that there is.

        Raises:
            ValueError: a negative number of classes, another pooling, or classes without pooling.
        """
        _check_at_least("num_classes", num_classes, 0)
        if global_pool is not None:
            _check_choice("global_pool", global_pool, ("avg", ""))
        pooled = self.pooled if global_pool is None else global_pool == "avg"
        if num_classes and not pooled:
            raise ValueError(f"global_pool='' needs num_classes=0, got {num_classes}")
        like = next(self.parameters())
        fc = _classifier(self.num_features, num_classes).to(like.device, like.dtype)
        self.fc = fc.train(self.training)
        self.num_classes, self.pooled = num_classes, pooled


def _classifier(num_features: int, num_classes: int) -> nn.Module:
    return nn.Linear(num_features, num_classes) if num_classes else nn.Identity()


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
