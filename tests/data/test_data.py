import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from qat_lightning.data import DigitsData, ImageFolderData, SST2Data, TorchvisionData
from qat_lightning.errors import ConfigurationError


def make_images(root, splits=("train", "test"), classes=("cat", "dog"), count=10, size=8):
    for split in splits:
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (size, size), (index, 100 * number, 7)).save(folder / f"{index}.png")
    return root


def make_mnist(root, name="MNIST", count=20):
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        for kind, data in (("images-idx3", np.zeros((count, 28, 28), np.uint8)), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            header = struct.pack(f">HBB{data.ndim}I", 0, 8, data.ndim, *data.shape)
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + data.tobytes())
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + data.tobytes()))
    return root


def make_sentences(root, **changes):
    rows = {"train": "sentence\tlabel\n" + "a good film\t1\na bad film\t0\n" * 10, "dev": "sentence\tlabel\nan unseen word\t0\ngood\t1\n"}
    for name, text in {**rows, **changes}.items():
        (root / f"{name}.tsv").write_text(text)
    return root


def ready(data):
    data.prepare_data()
    data.setup("fit")
    return data


def test_digits_are_split_by_class_and_fixed():
    first, second = ready(DigitsData()), ready(DigitsData())
    assert [len(part) for part in (first.train_set, first.val_set, first.test_set)] == [1212, 135, 450]
    assert torch.equal(first.test_set.tensors[1], second.test_set.tensors[1])
    assert first.test_set.tensors[1].bincount().min() >= 43


def test_digits_are_shifted_in_training_only():
    data = ready(DigitsData())
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (64, 1, 8, 8) and images.min() >= -1 and images.max() <= 1
    known = {image.numpy().tobytes() for image in data.calibration_set.tensors[0]}
    assert any(data.train_set[index][0].contiguous().numpy().tobytes() not in known for index in range(20))


def test_calibration_order_is_fixed_and_leaves_the_global_generator_alone():
    data = ready(DigitsData())
    state = torch.get_rng_state()
    once, again = (next(iter(data.calibration_dataloader().batch_sampler)) for _ in range(2))
    assert once == again and torch.equal(state, torch.get_rng_state())


def test_image_folder(tmp_path):
    data = ready(ImageFolderData(make_images(tmp_path), num_classes=2, num_workers=0, batch_size=4, val_fraction=0.25))
    assert [len(part) for part in (data.train_set, data.calibration_set, data.val_set, data.test_set)] == [15, 15, 5, 20]
    assert all(next(iter(loader))[0].shape == (4, 3, 8, 8) for loader in (data.train_dataloader(), data.calibration_dataloader()))


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_image_folder_resizes(augment, tmp_path):
    root = make_images(tmp_path, splits=("train", "val", "test"))
    data = ready(ImageFolderData(root, num_classes=2, image_size=12, augment=augment, num_workers=0))
    assert all(next(iter(loader))[0].shape[1:] == (3, 12, 12) for loader in (data.train_dataloader(), data.test_dataloader()))
    assert len(data.val_set) == 20


def test_image_folder_crops_what_it_has_resized(tmp_path):
    root = make_images(tmp_path, splits=("train", "test"))
    for path in root.glob("test/*/*"):
        Image.linear_gradient("L").save(path)
    small, large = (
        ready(ImageFolderData(root, num_classes=2, image_size=12, resize_size=size, num_workers=0)).test_set[0][0] for size in (None, 24)
    )
    assert small.shape == large.shape == (3, 12, 12) and not torch.equal(small, large)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"image_size": 0}, ValueError), ({"image_size": 12, "resize_size": 8}, ValueError), ({"image_size": 2.5}, TypeError)],
)
def test_image_folder_checks_its_sizes(arguments, error):
    with pytest.raises(error, match="_size"):
        ImageFolderData("images", num_classes=2, **arguments)
    with pytest.raises(ConfigurationError, match="`resize_size=24` needs `image_size`"):
        ImageFolderData("images", num_classes=2, resize_size=24)


@pytest.mark.parametrize(
    ("arguments", "make", "message"),
    [
        ({}, {"splits": ("test",)}, "needs a folder 'train'"),
        ({}, {"splits": ("train",)}, "needs a folder 'test'"),
        ({}, {"count": 0}, "folder of images per class"),
        ({"num_classes": 3}, {}, "2 classes, but `num_classes=3`"),
        ({"val_fraction": 0.001}, {}, "`val_fraction=0.001`"),
        ({"val_fraction": 1.5}, {}, "`val_fraction=1.5`"),
        ({"in_channels": 1}, {}, "`in_channels=1`"),
    ],
)
def test_image_folder_errors(arguments, make, message, tmp_path):
    make_images(tmp_path, **make)
    with pytest.raises(ConfigurationError, match=message):
        ready(ImageFolderData(tmp_path, **{"num_classes": 2, "num_workers": 0, **arguments}))


def test_image_folder_with_other_test_classes(tmp_path):
    make_images(tmp_path, splits=("train",))
    make_images(tmp_path, splits=("test",), classes=("cat", "cow"))
    with pytest.raises(ConfigurationError, match=r"\['cat', 'dog'\], but test has \['cat', 'cow'\]"):
        ready(ImageFolderData(tmp_path, num_classes=2))


@pytest.mark.parametrize(
    ("arguments", "error"), [({"batch_size": 0}, ValueError), ({"batch_size": 1.5}, TypeError), ({"num_workers": -1}, ValueError)]
)
def test_counts_are_checked(arguments, error):
    with pytest.raises(error, match=next(iter(arguments))):
        DigitsData(**arguments)


@pytest.mark.parametrize(("dataset", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_from_disk(dataset, folder, tmp_path):
    make_mnist(tmp_path, folder)
    data = ready(TorchvisionData(dataset, tmp_path, download=False, num_workers=0, in_channels=1, width=28, batch_size=4))
    assert next(iter(data.train_dataloader()))[0].shape == (4, 1, 28, 28)
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (18, 2, 20)


def test_cifar10_from_disk(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]:
        content = {"data": np.zeros((10, 3072), np.uint8), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {index}" for index in range(10)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args, **kwargs: True)
    data = ready(TorchvisionData("cifar10", tmp_path, download=False, num_workers=0, batch_size=4))
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 32, 32)


def test_data_that_was_not_downloaded(tmp_path):
    with pytest.raises(ConfigurationError, match="does not hold the data"):
        ready(TorchvisionData("cifar10", tmp_path, download=False))


def test_sentences_become_padded_batches(tmp_path):
    data = ready(SST2Data(make_sentences(tmp_path), batch_size=2))
    batch = next(iter(data.test_dataloader()))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 3)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"][0].tolist() == [1, 1, 1] and batch["labels"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "text\tlabel\nfine\t1\n"}, r"train.tsv: expected the header"),
        ({"train": "sentence\tlabel\nfine\t1\nno label\n"}, "train.tsv, line 3"),
        ({"dev": "sentence\tlabel\n"}, "dev.tsv has a header but no sentences"),
        ({"dev": "sentence\tlabel\nodd\t2\n"}, "3 classes, but `num_classes=2`"),
    ],
)
def test_sentence_errors(changes, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        ready(SST2Data(make_sentences(tmp_path, **changes)))


def test_missing_sentences(tmp_path):
    with pytest.raises(ConfigurationError, match=r"train\.tsv is missing"):
        ready(SST2Data(tmp_path))


@pytest.mark.parametrize(
    "build",
    [
        lambda root: ImageFolderData(root, num_classes=2),
        lambda root: SST2Data(root),
        lambda root: TorchvisionData("mnist", root, in_channels=1, width=28),
    ],
)
def test_the_home_folder_has_a_short_name(build, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build("~/images").root == tmp_path / "images"
