"""A ResNet-50 of fastres, and a module of one's own made fast.

python examples/quickstart.py
python examples/quickstart.py --weights IMAGENET1K_V2    # downloads 98 MB
"""

import argparse
import copy

import torch
from torch import Tensor, nn

import fastres


class Mine(nn.Module):
    """Any module: here a backbone with a head of its own."""

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Linear(1000, 64), nn.ReLU(), nn.Linear(64, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="published weights, e.g. IMAGENET1K_V2")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    arguments = parser.parse_args()
    images = torch.randn(2, 3, arguments.size, arguments.size)

    # A live model: an ordinary module whose inference is fused while its weights may change.
    model = fastres.resnet50(weights=arguments.weights).eval()
    with torch.inference_mode():
        before = model(images)
        model.fc.bias.add_(1.0)  # noticed, and folded again
        after = model(images)
    print(f"logits moved by {(after - before).mean():.3f}")

    # A frozen copy of any module, compared with it before it answers.
    mine = Mine(copy.deepcopy(model), classes=3).eval()
    fast = fastres.optimize(mine, example_input=images)
    print(fast.plan())
    print(fast.verification.reason)


if __name__ == "__main__":
    main()
