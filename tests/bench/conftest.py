"""What the tests of benchmarks time."""

import pytest

from fastres.bench.run import calibrate_
from fastres.models.registry import create_model
from fastres.models.resnet import ResNet


@pytest.fixture(scope="module")
def model() -> ResNet:
    built = create_model("resnet18", num_classes=10).eval()
    calibrate_(built)
    return built
