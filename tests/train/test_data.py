"""Data sets as files of their own forms, written here by hand."""

import gzip
import struct

import numpy as np
import pytest
import torch

from fastres.train.batches import Batches
from fastres.train.config import Config
from fastres.train.data import from_tensors, open_data

GIVEN = np.random.default_rng(5)


def write_idx(folder, part, images, labels, compressed):
    opened, end = (gzip.open, ".gz") if compressed else (open, "")
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}i", *array.shape)
        with opened(folder / f"{part}-{name}-ubyte{end}", "wb") as file:
            file.write(head + array.tobytes())


@pytest.mark.parametrize("compressed", [True, False])
def test_idx_files(compressed, tmp_path):
    images = GIVEN.integers(0, 256, (7, 5, 6), np.uint8)
    labels = np.array([0, 2, 1, 2, 0, 1, 2], np.uint8)
    write_idx(tmp_path, "train", images, labels, compressed)
    write_idx(tmp_path, "t10k", images[:3], labels[:3], compressed)
    data = open_data(f"mnist:{tmp_path}")
    assert np.array_equal(data.train.images[:, 0].numpy(), images)
    assert data.train.labels.tolist() == labels.tolist()
    assert len(data.validation) == 3
    assert data.classes == ("0", "1", "2")
    assert data.mean == pytest.approx([(images / 255).mean()], rel=1e-6)
    assert data.std == pytest.approx([(images / 255).std()], rel=1e-6)


def test_idx_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(ValueError, match=r"no train-images-idx3-ubyte nor .*gz in .*download it"):
        open_data(f"fashion-mnist:{tmp_path}")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(struct.pack(">HBBiii", 0, 8, 3, 9, 9, 9))
    with pytest.raises(ValueError, match="is no idx file of bytes"):
        open_data(f"mnist:{tmp_path}")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"")
    with pytest.raises(ValueError, match="is no idx file of bytes"):
        open_data(f"mnist:{tmp_path}")


def test_npz(tmp_path):
    x, y = GIVEN.integers(0, 256, (6, 8, 8, 3), np.uint8), np.arange(6).reshape(6, 1) % 2
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    data = open_data(str(tmp_path / "set.npz"))
    assert np.array_equal(data.train.images.numpy(), x.transpose(0, 3, 1, 2))
    assert data.mean == pytest.approx((x / 255).mean((0, 1, 2)).tolist(), rel=1e-6)
    np.savez(tmp_path / "other.npz", x=x)
    with pytest.raises(ValueError, match="must hold x_train and y_train; got x"):
        open_data(str(tmp_path / "other.npz"))
    np.savez(tmp_path / "objects.npz", x_train=np.array([{}]), y_train=y)
    with pytest.raises(ValueError, match="cannot read"):
        open_data(str(tmp_path / "objects.npz"))


def pictures(root, names=("cat", "dog"), count=3):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for part in ("train", "val"):
        for name in names:
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = GIVEN.integers(0, 256, (40, 50, 3), np.uint8)
                image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_folders_of_classes(workers, tmp_path):
    data = open_data(str(pictures(tmp_path)))
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    found = {}
    for size in (2, 3):
        batches = Batches(
            data, Config(batch_size=size, resize=16, workers=workers), torch.device("cpu")
        )
        state = torch.get_rng_state()
        images = torch.cat([x for x, _ in batches.train(1)])
        assert torch.equal(torch.get_rng_state(), state)
        found[size] = images[torch.cat(batches.order(1)).argsort()]
        assert images.shape == (6, 3, 16, 16)
    assert torch.equal(found[2], found[3])
    assert torch.equal(next(batches.train(1, 1))[0], list(batches.train(1))[1][0])
    assert sum(len(x) for x, _ in batches.validation()) == 6
    for name in ("cat/1.png", "cat/2.png"):
        (tmp_path / "train" / name).write_bytes((tmp_path / "train/cat/0.png").read_bytes())
    batches = Batches(data, Config(batch_size=6, resize=16), torch.device("cpu"))
    crops = next(batches.train(0))[0][batches.order(0)[0].argsort()][:3]
    assert not torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[1], crops[2])


def test_damaged_pictures_are_named_at_the_start_or_left_out(tmp_path):
    """One that is none, and a JPEG whose second half is missing, of which the header is whole."""
    pictures(tmp_path)
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"no picture")
    cut = tmp_path / "val" / "cat" / "cut.jpg"
    image.fromarray(GIVEN.integers(0, 256, (90, 90, 3), np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"1 of 6 files are no images: .*dog/1.png .*=skip leaves"):
        open_data(str(tmp_path))
    with pytest.warns(UserWarning, match=r"left out, 1 of . files are no images") as said:
        data = open_data(str(tmp_path), on_bad_file="skip")
    assert [name in str(w.message) for w, name in zip(said, ("dog/1.png", "cut.jpg"), strict=True)]
    assert data.skipped == 2
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert [path.name for path in data.train.source.paths[3:]] == ["0.png", "2.png"]
    assert len(data.validation) == 6
    for name in ("0.png", "2.png"):
        (tmp_path / "train" / "dog" / name).write_bytes(b"")
    with pytest.warns(match="left out"), pytest.raises(ValueError, match="read of dog"):
        open_data(str(tmp_path), on_bad_file="skip")


def test_small_sets_live_on_the_device(monkeypatch):
    """The meta device stands for a GPU: only small images go there, the labels always."""
    images = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    data = from_tensors(images, torch.arange(6) % 2, (images[:2], torch.tensor([0, 1])))
    there = data.on(torch.device("meta"))
    assert there.train.images.is_meta
    assert there.train.labels.is_meta
    assert there.validation.images.is_meta
    monkeypatch.setattr("fastres.train.data.ON_DEVICE", 96)
    there = data.on(torch.device("meta"))
    assert not there.train.images.is_meta
    assert there.train.labels.is_meta
    assert there.validation.images.is_meta
    assert not data.train.images.is_meta


def test_folders_that_are_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="must hold train/CLASS"):
        open_data(str(tmp_path))
    pictures(tmp_path)
    (tmp_path / "val" / "fish").mkdir()
    with pytest.raises(ValueError, match="is no folder of classes"):
        open_data(str(tmp_path))
    (tmp_path / "val" / "fish" / "a.png").write_bytes(
        (tmp_path / "train" / "cat" / "0.png").read_bytes()
    )
    with pytest.raises(ValueError, match="the same classes; not in both: fish"):
        open_data(str(tmp_path))
    with pytest.raises(ValueError, match="there is no data set 'imagenet'; give digits, mnist"):
        open_data("imagenet")
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="there is no whole CIFAR-10"):
        open_data(f"cifar10:{tmp_path}")


def test_images_are_resized_for_the_network():
    x = torch.arange(2 * 64, dtype=torch.float32).view(2, 1, 8, 8)
    batches = Batches(
        from_tensors(x, torch.tensor([0, 1])), Config(batch_size=2, resize=4), torch.device("cpu")
    )
    ((small, _),) = batches.train(0)
    order = batches.order(0)[0]
    # a triangle of twice the step: the weights of four pixels are 1, 3, 3, 1, cut at the borders
    rows = torch.tensor([[3, 3, 1, 0, 0, 0, 0, 0], [0, 1, 3, 3, 1, 0, 0, 0]]) / torch.tensor(
        [[7], [8]]
    )
    inner = (rows @ x[order, 0] @ rows.t())[:, :2, :2]
    torch.testing.assert_close(small[:, 0, :2, :2], inner)
