"""torchvision's detectors, whole: the boxes of a fused copy are the source's."""

import gc
import warnings

import pytest
import torch
from helpers import adversarial_, real_images
from torch.utils._pytree import tree_leaves

import fastres
from fastres.frontends.fast_shell import FastShell

torchvision = pytest.importorskip("torchvision")
from torchvision.models import detection  # noqa: E402
from torchvision.ops import box_iou  # noqa: E402

SMALL = {"num_classes": 5, "min_size": 96, "max_size": 128}
CLASSES = {
    "fasterrcnn": (detection.FasterRCNN, {"box_detections_per_img": 20}),
    "maskrcnn": (detection.MaskRCNN, {"box_detections_per_img": 20}),
    "keypointrcnn": (detection.KeypointRCNN, {"box_detections_per_img": 20, "num_keypoints": 3}),
    "retinanet": (detection.RetinaNet, {"detections_per_img": 50}),
    "fcos": (detection.FCOS, {"detections_per_img": 50}),
}


def detector(name):
    """As torchvision's builders make it, on a ResNet-18."""
    torch.manual_seed(0)
    if name == "ssdlite":
        options = {"weights": None, "weights_backbone": None, "num_classes": 5}
        return adversarial_(
            detection.ssdlite320_mobilenet_v3_large(**options, detections_per_img=50)
        )
    cls, options = CLASSES[name]
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d
    )
    if name in ("retinanet", "fcos"):
        options = {**options, "topk_candidates": 200}
    if name == "fcos":  # one anchor a place
        sizes = ((8,), (16,), (32,), (64,), (128,))
        anchors = detection.anchor_utils.AnchorGenerator(sizes, ((1.0,),) * 5)
        options = {**options, "anchor_generator": anchors}
    if name == "retinanet":
        sizes = tuple((s, int(s * 2**0.5)) for s in (16, 32, 64, 128, 256))
        anchors = detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        options = {**options, "anchor_generator": anchors}
    if "rcnn" in name:  # narrow heads: the usual ones take most of the memory
        options = {**options, "num_classes": None}
        options["box_head"] = detection.faster_rcnn.TwoMLPHead(256 * 7 * 7, 64)
        options["box_predictor"] = detection.faster_rcnn.FastRCNNPredictor(64, 5)
    if name == "maskrcnn":
        options["mask_predictor"] = detection.mask_rcnn.MaskRCNNPredictor(256, 64, 5)
    if name == "keypointrcnn":
        head = detection.keypoint_rcnn.KeypointRCNNHeads(256, (64, 64))
        predictor = detection.keypoint_rcnn.KeypointRCNNPredictor(64, 3)
        options |= {"keypoint_head": head, "keypoint_predictor": predictor, "num_keypoints": None}
    return adversarial_(cls(backbone, **{**SMALL, **options}))


@pytest.fixture(autouse=True)
def _freed():
    """A shell and its routed modules hold each other, hundreds of megabytes of them."""
    yield
    gc.collect()


@pytest.fixture
def images():
    """Of different sizes, as detectors take them."""
    one, two = real_images(2, 128)
    return [one[:, :96, :120].contiguous(), two[:, :100, :90].contiguous()]


@torch.no_grad()
def both(source, images):
    """The answers of the source and of its copy, all of whose parts were admitted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs as ordinary PyTorch")
        fast = fastres.optimize(source)
        fast(images)
        found = fast(images)  # the first call is PyTorch's own where the check was not passed
    assert isinstance(fast, FastShell)
    assert fast.plan().fused
    return source(images), found


def matched(a, b):
    """The share of a's boxes to which b has one of the same label, nearly as likely. Boxes cut off
    by the image's edge may be without area, so without any intersection."""
    same = a["labels"][:, None] == b["labels"]
    close = (a["scores"][:, None] - b["scores"]).abs() < 1e-3
    corners = (a["boxes"][:, None] - b["boxes"]).abs().amax(-1) < 0.1
    near = corners | (box_iou(a["boxes"], b["boxes"]) > 0.95)
    return (near & same & close).any(1).double().mean()


NAMES = ["ssdlite", *CLASSES]


@pytest.mark.sample(6)
@pytest.mark.fault(84)
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_float32_detectors_find_the_sources_boxes(name, images):
    for want, got in zip(*both(detector(name), images), strict=True):
        assert want.keys() == got.keys()
        assert len(want["boxes"])
        assert min(matched(want, got), matched(got, want)) > 0.9


@pytest.mark.sample(3)
@pytest.mark.fault(86)
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_float64_detectors_are_admitted_and_equal(name, images):
    source = detector(name).double()
    want, got = both(source, [image.double() for image in images])
    for theirs, ours in zip(tree_leaves(want), tree_leaves(got), strict=True):
        scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * scale)


@pytest.mark.fault(50)
@pytest.mark.parametrize("name", ["ssdlite", "retinanet", "fcos"])
def test_the_score_threshold_of_each_kind(name, images):
    """Of those with a region network, `roi_heads` holds it."""
    source = detector(name)
    fast = fastres.optimize(source, verify=False)
    images = images[:1]
    assert len(fast(images)[0]["boxes"])
    fast.score_thresh = 2.0
    assert not len(fast(images)[0]["boxes"])
    assert source.score_thresh < 1
