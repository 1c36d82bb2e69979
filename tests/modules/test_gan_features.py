import pytest
import torch

from modules.gan_features import ClassifierFeatures, TorchScriptFeatures
from tests.modules.image_sets import digits, noise

NUM_TRAINED = 1400


def make(num_classes, resolution=8, seed=1):
    return ClassifierFeatures(
        channels=1,
        resolution=resolution,
        num_classes=num_classes,
        training_images=NUM_TRAINED,
        training_steps=300,
        seed=seed,
    )


@pytest.fixture(scope="module")
def data():
    return digits(8)


@pytest.fixture(scope="module")
def by_labels(data):
    classifier = make(num_classes=10)
    classifier.train_on(data[0][:NUM_TRAINED], data[1][:NUM_TRAINED])
    return classifier


def test_classifier_knows_held_out_digits(by_labels, data):
    images, labels = data[0][NUM_TRAINED:], data[1][NUM_TRAINED:]
    assert (by_labels.classify(images).argmax(1) == labels).float().mean() > 0.9
    assert by_labels(images).shape == (len(images), by_labels.num_features)
    mean_square = by_labels(data[0][:NUM_TRAINED]).square().mean().item()
    assert mean_square == pytest.approx(1, abs=1e-4)


def test_classifier_without_labels_knows_how_images_are_turned(data):
    images, _ = data
    classifier = make(num_classes=None)
    classifier.train_on(images[:NUM_TRAINED], None)
    turned = [classifier.classify(images[NUM_TRAINED:].rot90(k, (2, 3))) for k in range(4)]
    hits = [(logits.argmax(1) == k).float().mean() for k, logits in enumerate(turned)]
    assert sum(hits) / 4 > 0.8


def test_classifier_is_a_function_of_its_seed_and_of_nothing_else(by_labels, data):
    images, labels = (each[:NUM_TRAINED] for each in data)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = make(num_classes=10)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):  # as in a validation
        again.train_on(images, labels)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in by_labels.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert again.name == by_labels.name
    other = make(num_classes=10, seed=2)
    assert not torch.equal(
        other._initial_weights(torch.Generator().manual_seed(2))["head"],
        again._initial_weights(torch.Generator().manual_seed(1))["head"],
    )


def test_classifier_is_named_by_its_training_and_its_weights(by_labels):
    words = by_labels.name.split("|")
    assert words[:4] == ["classifier-of-10-labels", "images:1400", "steps:300", "seed:1"]
    restored = make(num_classes=10)
    assert restored.name != by_labels.name  # yet to be trained
    restored.load_state_dict(by_labels.state_dict())
    assert restored.name == by_labels.name
    restored.get_buffer("weight0")[0, 0, 0, 0] += 1e-3  # trained on other images, say
    assert restored.name.split("|")[:4] == words[:4]
    assert restored.name != by_labels.name
    assert make(num_classes=None).name.startswith("classifier-of-turns|")


def test_trained_classifier_lives_in_the_state_and_no_optimizer_finds_it(by_labels, data):
    assert not list(by_labels.parameters())
    restored = make(num_classes=10, seed=7)
    assert not restored.is_trained
    restored.load_state_dict(by_labels.state_dict())
    assert restored.is_trained
    assert torch.equal(restored(data[0][:9]), by_labels(data[0][:9]))


@pytest.mark.parametrize(("resolution", "num_layers"), [(8, 3), (28, 4), (32, 4), (64, 5)])
def test_classifier_halves_images_to_four_pixels(resolution, num_layers):
    assert make(num_classes=10, resolution=resolution).num_layers == num_layers


def test_classifier_sees_large_images_averaged_down():
    classifier = make(num_classes=None, resolution=128)
    small = noise(2, 1, 64, 64)
    weights = classifier._initial_weights(torch.Generator().manual_seed(1))
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    features = [classifier._features(images, weights) for images in (small, large)]
    torch.testing.assert_close(*features)


def test_classifier_of_labels_needs_labels(data):
    with pytest.raises(ValueError, match=r"extractor.num_classes=10 -> the data has no labels"):
        make(num_classes=10).train_on(data[0], None)


class Detector(torch.nn.Module):
    """Takes the options of NVIDIA's Inception."""

    def forward(self, img: torch.Tensor, use_fp16: bool = False, return_features: bool = False):
        """Sum pixels where no features are asked for."""
        pixels = img.flatten(1)
        return pixels if return_features else pixels.sum(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_features_of_a_torchscript_file(tmp_path):
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(Detector()).save(str(path))
    features = TorchScriptFeatures(path=str(path), num_features=12, is_inception=True)
    assert features.name == "inception-2015-12-05"
    assert not features.state_dict()
    grey = noise(3, 1, 2, 2)
    assert torch.equal(features(grey), grey.flatten(1).repeat(1, 3).float())
    torch.jit.trace(torch.nn.Flatten(), grey).save(str(path))  # without such an option
    colour = noise(3, 3, 2, 2)
    plain = TorchScriptFeatures(path=str(path), num_features=12, is_inception=False)
    assert torch.equal(plain(colour), colour.flatten(1).float())


def test_file_that_is_no_torchscript_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    with pytest.raises(ValueError, match=r"extractor.path=.* -> no such file -> "):
        TorchScriptFeatures(path=str(path), num_features=1, is_inception=True)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"extractor.path=.* -> it is no TorchScript file \("):
        TorchScriptFeatures(path=str(path), num_features=1, is_inception=True)
