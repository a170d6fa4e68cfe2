"""Is a user's own data read as meant, and refused before any work is lost?"""

import dataclasses

import numpy as np
import pytest
import torch

from impl.core import Engine, StudyError
from impl.models import load, spec_of
from impl.models.images import labelled_images
from impl.models.inputs import check_own_data, images
from impl.models.quality import quality_of
from tests.inner import fresh_pytest

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A small ResNet of three classes, with its image processor."""
    import transformers

    folder = tmp_path_factory.mktemp("checkpoint") / "resnet"
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        id2label=dict(enumerate(CLASSES)), label2id={c: i for i, c in enumerate(CLASSES)},
    )  # fmt: skip
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path):
    """Two pictures per class: the classes' grey levels differ; one folder is named by number."""
    from PIL import Image

    for number, folder in enumerate(["cat", "dog", "2"]):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for i in range(2):
            level = np.full((40, 50, 3), 100 * number + i, dtype=np.uint8)
            Image.fromarray(level).save(tmp_path / "data" / folder / f"{i}.png")
    return tmp_path / "data"


def with_data(classifier, folder):
    return dataclasses.replace(spec_of(classifier), data=str(folder))


def test_folders_are_classes_by_name_or_number(classifier, pictures):
    found, labels = labelled_images(with_data(classifier, pictures))
    assert found.shape == (6, 3, 32, 32)
    assert labels.tolist() == [2, 2, 0, 0, 1, 1]  # folders "2", "cat", "dog"
    assert found[0].unique().tolist() == pytest.approx([(200 / 255 - 0.5) / 0.5])


def test_accuracy_is_that_of_the_user_s_labels(classifier, pictures):
    spec = with_data(classifier, pictures)
    _, model = load(spec, torch.float32, "cpu")
    engine = Engine(spec, model, torch.float32, torch.device("cpu"), 1)
    (metric,) = quality_of(engine, engine)
    found, labels = labelled_images(spec)
    with torch.inference_mode():
        right = (engine.forward(found).argmax(-1) == labels).double().mean().item()
    assert metric["metric"] == "accuracy"
    assert metric["value"] == metric["baseline"] == right
    assert torch.equal(images(spec, 4, 1), found[[4, 5, 0, 1]])  # the speed is measured on them too


def test_a_folder_without_its_class_or_images_is_one_sentence(classifier, pictures, tmp_path):
    (tmp_path / "empty/cat").mkdir(parents=True)
    refused = {"none": r"there is no folder .*none", "empty": "holds no images; put them in one"}
    for folder, sentence in refused.items():
        with pytest.raises(StudyError, match=sentence):
            check_own_data(with_data(classifier, tmp_path / folder))
    (pictures / "dgo").mkdir()
    with pytest.raises(StudyError, match=r"unknown class of .* 'dgo'; did you mean 'dog'"):
        check_own_data(with_data(classifier, pictures))


def test_a_broken_picture_is_named(classifier, pictures):
    (pictures / "cat/0.png").write_bytes(b"not a picture")
    with pytest.raises(StudyError, match=r"cat/0\.png is not an image that can be read"):
        labelled_images(with_data(classifier, pictures))


def test_text_is_not_for_classifiers(classifier, tmp_path):
    spec = dataclasses.replace(spec_of(classifier), text=str(tmp_path / "text"))
    with pytest.raises(StudyError, match=r"--text is for a decoder; .* is a classifier: leave it"):
        check_own_data(spec)


def test_bad_data_ends_the_run_before_any_cell(classifier, tmp_path):
    done = fresh_pytest("--benchmark-only", "--model", classifier,
                        "--data", str(tmp_path / "nowhere"), "tests/test_latency.py")  # fmt: skip
    assert done.returncode == 4
    assert f"there is no folder {tmp_path}/nowhere; give --data DIR" in done.stderr
