"""What a worker answers, against ``fastres.classify`` and PyTorch on the same files."""

import json

import numpy as np
import pytest
import torch
from helpers import adversarial_
from torch import nn

import fastres
from fastres.batch import Classifier
from fastres.models.classify import classify, read_image
from fastres.models.registry import create_model

torchvision = pytest.importorskip("torchvision")
Image = pytest.importorskip("PIL.Image")
pa = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A JPEG, a grey PNG, and one of a camera held upright; (width, height) beside each."""
    folder = tmp_path_factory.mktemp("photos")
    temple, flower = (Image.fromarray(pixels) for pixels in datasets.load_sample_images().images)
    orientation = Image.Exif()
    orientation[0x0112] = 6
    temple.save(folder / "temple.jpg")
    flower.convert("L").crop((3, 5, 300, 400)).save(folder / "flower.png")
    flower.save(folder / "upright.jpg", exif=orientation)
    return {
        folder / "temple.jpg": temple.size,
        folder / "flower.png": (297, 395),
        folder / "upright.jpg": flower.size[::-1],
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(adversarial_(create_model("resnet18")).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def ours(checkpoint):
    return Classifier("resnet18", checkpoint=checkpoint, top=3, batch_size=2, embeddings="avgpool")


def test_rows_are_what_classify_says(photos, checkpoint, ours):
    rows = ours.rows([path.read_bytes() for path in photos])
    expected = classify(list(photos), model="resnet18", checkpoint=checkpoint, top=3)
    for row, photo, size in zip(rows, expected, photos.values(), strict=True):
        names, values = zip(*photo.top, strict=True)
        assert row.names == list(names) == [ours.names[i] for i in row.labels]
        # The normalisation is folded into the weights here: a few units in the last place.
        assert row.probabilities == pytest.approx(values, rel=1e-4)
        assert (row.width, row.height) == size
        assert row.error is None


@pytest.mark.parametrize("name", ["avgpool", "layer4"])
def test_embeddings_are_what_the_module_gives(name, photos, checkpoint, ours):
    if name != ours.embeddings:
        ours = Classifier("resnet18", checkpoint=checkpoint, embeddings=name, batch_size=3)
    theirs = torchvision.models.resnet18()
    theirs.load_state_dict(torch.load(checkpoint, weights_only=True))
    seen = []
    getattr(theirs, name).register_forward_hook(lambda *args: seen.append(args[2].flatten(1)))
    transforms = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    with torch.no_grad():
        theirs.eval()(torch.stack([read_image(path, transforms) for path in photos]))
    rows = ours.rows([path.read_bytes() for path in photos])
    found = torch.from_numpy(np.stack([row.embedding for row in rows]))
    assert found.dtype is torch.float32
    # Of the largest value: the folded weights are rounded once more, 20 layers deep.
    assert (found - seen[0]).abs().max() <= 1e-4 * seen[0].abs().max()


@pytest.mark.fault(96)
def test_a_bad_image_is_a_row_with_its_reason(photos, ours):
    good = next(iter(photos)).read_bytes()

    def gone():
        raise FileNotFoundError(2, "No such file or directory", "a.jpg")

    def locked():
        raise PermissionError("a.jpg is locked")

    bad = [b"", b"<html>404</html>", good[:4000], gone, locked]
    rows = ours.rows([bad[0], good, *bad[1:], lambda: good])
    (alone,) = ours.rows([good])
    assert [row.error for row in rows] == [
        "cannot read image: cannot identify image file",
        None,
        "cannot read image: cannot identify image file",
        rows[3].error,
        "there is no such file",
        "a.jpg is locked",
        None,
    ]
    assert "image file is truncated" in rows[3].error
    for row in (rows[1], rows[6]):
        assert row.labels == alone.labels
        # A batch of another size may be summed in another order.
        assert row.probabilities == pytest.approx(alone.probabilities, rel=1e-5)
    empty = [(row.labels, row.names, row.embedding, row.width) for row in rows if row.error]
    assert empty == [(None,) * 4] * 5


@pytest.mark.fault(96)
def test_a_bomb_is_an_error_and_is_not_unpacked(ours, monkeypatch, photos):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 640 * 427 // 2 - 1)
    (row,) = ours.rows([next(iter(photos)).read_bytes()])
    assert "decompression bomb" in row.error


def test_tables_have_one_schema_even_of_errors_alone(photos, ours):
    full = ours({"bytes": [path.read_bytes() for path in photos], "id": ["a", "b", "c"]})
    errors = ours({"bytes": np.array([b"no image"], dtype=object), "id": np.array(["d"])})
    assert full.schema == errors.schema
    assert full.schema.field("embedding").type == pa.list_(pa.float32(), 512)
    both = pa.concat_tables([full, errors]).to_pydict()
    assert both["id"] == ["a", "b", "c", "d"]
    assert both["labels"][3] is None
    assert both["error"][:3] == [None] * 3
    assert "embedding" not in Classifier.schema(_plain(ours)).names


def _plain(ours):
    other = object.__new__(Classifier)
    vars(other).update(vars(ours), embeddings=None)
    return other


def test_a_row_is_plain_data(photos, ours):
    (row,) = ours.rows([next(iter(photos)).read_bytes()])
    read = json.loads(json.dumps(row.to_dict()))
    assert read["labels"] == row.labels
    assert read["embedding"] == row.embedding.tolist()


def test_fast_decoding_gives_nearly_the_same_pixels(photos, checkpoint, ours):
    large = Image.open(next(iter(photos))).resize((2560, 1708), Image.Resampling.BICUBIC)
    from io import BytesIO

    file = BytesIO()
    large.save(file, "JPEG", quality=95)
    quick = Classifier("resnet18", checkpoint=checkpoint, fast_decode=True)
    (slow,), (fast,) = ours.rows([file.getvalue()]), quick.rows([file.getvalue()])
    assert (fast.width, fast.height) == (slow.width, slow.height) == (2560, 1708)
    assert fast.probabilities != slow.probabilities[:5]
    assert quick.to_dict()["preprocessing"]["fast_decode"]


class Numbers(nn.Sequential):
    """A small network of three classes."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        )


@pytest.mark.parametrize("folded", [False, True], ids=["floats", "bytes"])
def test_a_fused_file_of_floats_or_bytes(folded, photos, tmp_path):
    network = Numbers().eval()
    normalize = fastres.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    source = nn.Sequential(normalize, network) if folded else network
    shape = (2, 3, 64, 64)
    example = torch.randint(0, 256, shape, dtype=torch.uint8) if folded else torch.randn(shape)
    path = tmp_path / "fused.safetensors"
    fastres.save(fastres.optimize(source, example), path)
    transforms = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    with torch.no_grad():
        images = torch.stack([read_image(photo, transforms) for photo in photos])
        expected = network(images).softmax(1).topk(2)
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    ours = Classifier(str(path), labels=tmp_path / "names.txt", top=2, decode_threads=2)
    rows = ours.rows([photo.read_bytes() for photo in photos])
    assert [row.labels for row in rows] == expected.indices.tolist()
    assert [row.names[0] for row in rows] == [
        ["ant", "bee", "cat"][int(index)] for index in expected.indices[:, 0]
    ]
    for row, values in zip(rows, expected.values.tolist(), strict=True):
        assert row.probabilities == pytest.approx(values, rel=1e-5)
    with pytest.raises(ValueError, match="embeddings need the network itself"):
        Classifier(str(path), embeddings="avgpool")
    with pytest.raises(ValueError, match=r"dtype must be the file's own, torch.float32; got"):
        Classifier(str(path), dtype="bfloat16")
    with pytest.raises(ValueError, match="must be named in full"):
        Classifier(str(path), weights="IMAGENET1K_V2")
    second = Classifier(str(path), weights="ResNet50_Weights.IMAGENET1K_V2")
    assert second.to_dict()["preprocessing"]["resize"] == 232
    assert second.names == ["class 0", "class 1", "class 2"]


def test_a_training_run_brings_its_preprocessing_and_names(photos, tmp_path):
    model = adversarial_(create_model("resnet18", num_classes=2)).eval()
    fastres.save_checkpoint(model.state_dict(), tmp_path / "best.safetensors")
    config = {"model": "resnet18", "classes": ["cat", "dog"], "options": {"resize": 112}}
    config |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = Classifier(str(tmp_path))
    assert ours.names == ["cat", "dog"]
    assert (ours.to_dict()["preprocessing"]["resize"], len(ours.rows([b""]))) == (128, 1)
    with pytest.raises(ValueError, match="which has weights"):
        Classifier(str(tmp_path), checkpoint=tmp_path / "best.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "mean": [0.5]}))
    with pytest.raises(ValueError, match="was not trained on images in folders"):
        Classifier(str(tmp_path))


def test_mistakes_are_named_before_anything_is_loaded(monkeypatch, checkpoint, tmp_path):
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="labels must have a line for each of the 1000 classes"):
        Classifier("resnet18", checkpoint=checkpoint, labels=tmp_path / "names.txt")

    def loaded(*args):
        raise AssertionError("the network was loaded")

    monkeypatch.setattr("fastres.batch.network.read_network", loaded)
    for options, message in (
        ({"top": 0}, "top must be an integer from 1 on; got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer from 1 on; got 2.5"),
        ({"embeddings": "fc"}, "embeddings must be one of avgpool, layer4; got 'fc'"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda"),
        ({"weights": "V9"}, "unknown weights 'V9' for resnet50"),
        ({"model": "resnet5"}, "No weights available for model resnet5"),
        ({"model": "a.h5"}, "convert a.h5 first"),
    ):
        with pytest.raises(ValueError, match=message):
            Classifier(**options)
    with pytest.raises(FileNotFoundError):
        Classifier(labels=tmp_path / "none.txt")


def test_the_hash_is_of_the_weights(tmp_path):
    network = Numbers().eval()
    found = []
    for name, step in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        with torch.no_grad():
            network[4].bias[1] += step
        path = tmp_path / f"{name}.safetensors"
        fastres.save(fastres.optimize(network, torch.randn(2, 3, 64, 64)), path)
        found.append(Classifier(str(path)).to_dict()["weights_sha256"])
    assert found[0] == found[1] != found[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_last_batch_is_filled_up_on_a_gpu(photos, checkpoint):
    options = {"checkpoint": checkpoint, "dtype": "float32", "batch_size": 8}
    cpu, gpu = (Classifier("resnet18", device=d, **options) for d in ("cpu", "cuda"))
    images = [path.read_bytes() for path in photos]
    for ours, theirs in zip(gpu.rows(images), cpu.rows(images), strict=True):
        assert ours.names[0] == theirs.names[0]
