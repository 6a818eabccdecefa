"""Image files in bytes to labels as plain data: what a service of any kind calls."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ..batch.classifier import Classifier, Row


class Predictor:
    """A network that is warm, and answers lists of image files.

    Args:
        model: a network with published weights, a fused ``.safetensors`` file (8-bit ones too), or
            the folder of a training run.
        max_batch: images that the network takes at once.
        options: the others of :class:`fastres.batch.Classifier`: weights, checkpoint, labels,
            dtype, device, top, threads and so on.

    Raises:
        ValueError, FastresError, OSError: as the Classifier says.
    """

    def __init__(self, model: str = "resnet50", *, max_batch: int = 1, **options: Any) -> None:
        from PIL import Image

        self.classifier = Classifier(model, batch_size=max_batch, **options)
        picture = io.BytesIO()
        Image.new("RGB", (256, 256)).save(picture, "png")
        for count in {1, max_batch}:
            self.many([picture.getvalue()] * count)

    def many(self, images: Sequence[bytes]) -> list[dict[str, Any]]:
        """The answers to image files, in their order.

        Returns:
            For each ``{"top": [{"index", "label", "probability"}, ...], "width", "height"}``, best
            first; ``{"error": reason}`` for what is no image, and the others are answered.
        """
        return [_plain(row) for row in self.classifier.rows(images)]


def _plain(row: Row) -> dict[str, Any]:
    if row.labels is None or row.names is None or row.probabilities is None:
        return {"error": row.error}
    best = zip(row.labels, row.names, row.probabilities, strict=True)
    top = [{"index": i, "label": name, "probability": value} for i, name, value in best]
    return {"top": top, "width": row.width, "height": row.height}
