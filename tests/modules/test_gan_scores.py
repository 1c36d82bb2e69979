import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from benchmarks.cells import start_ranks
from modules.gan_features import ClassifierFeatures
from modules.gan_scores import ImageScores
from tests.modules.gan_score_ranks import GENERATED, REAL, SHARES
from tests.modules.image_sets import Pixels, digits, noise


def score(extractor, real, generated, split="val"):
    scores = ImageScores(extractor)
    scores.prepare(split, None, None)
    for batch in real.split(7):
        scores.update(batch, is_real=True)
    for batch in generated.split(5):
        scores.update(batch, is_real=False)
    return scores.compute(), scores


def features_of(images):
    return images.flatten(1).double().numpy() / 255


def frechet_by_scipy(real, generated):
    """Heusel et al. 2017, equation 6, with scipy's root of a matrix."""
    means, covariances = [], []
    for features in map(features_of, (real, generated)):
        means.append(features.mean(0))
        covariances.append(np.cov(features, rowvar=False))
    root = np.real(np.asarray(scipy.linalg.sqrtm(covariances[0] @ covariances[1])))
    return ((means[0] - means[1]) ** 2).sum() + np.trace(sum(covariances) - 2 * root)


def kernel_by_loops(real, generated):
    """Binkowski et al. 2018: the mean over pairs of different images, pair by pair."""
    sets = [features_of(images) for images in (real, generated)]

    def mean(one, other):
        values = [
            (x @ y / len(x) + 1) ** 3
            for i, x in enumerate(one)
            for j, y in enumerate(other)
            if not (one is other and i == j)
        ]
        return sum(values) / len(values)

    return mean(sets[0], sets[0]) + mean(sets[1], sets[1]) - 2 * mean(*sets)


def test_scores_equal_their_definitions():
    found, _ = score(Pixels(4), REAL, GENERATED)
    assert found["frechet_distance"] == pytest.approx(frechet_by_scipy(REAL, GENERATED), rel=1e-6)
    assert found["kernel_distance"] == pytest.approx(kernel_by_loops(REAL, GENERATED), rel=1e-5)
    same, _ = score(Pixels(4), REAL, REAL)
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_normal_features_is_the_closed_form():
    class Normal(Pixels):
        """Of one feature: a normal variable, its quantile by the two bytes of an image."""

        def forward(self, images):
            ranks = images.flatten(1).double() @ torch.tensor([256.0, 1.0]).double()
            normal = torch.special.ndtri((ranks + 0.5) / 2**16)
            return normal.unsqueeze(1).float() * self.scale + self.mean

    values = torch.arange(2**16)
    images = torch.stack([values // 256, values % 256], 1).byte()[:, None, None]
    extractor = Normal(1)
    scores = ImageScores(extractor)
    for is_real, (extractor.mean, extractor.scale) in ((True, (0.0, 1.0)), (False, (3.0, 2.0))):
        scores.frechet.update(extractor(images).double(), real=is_real)
    assert float(scores.frechet.compute()) == pytest.approx(3**2 + (2 - 1) ** 2, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*will save all extracted features:UserWarning")
def test_kernel_distance_is_torchmetrics_over_one_subset_of_all():
    found, _ = score(Pixels(4), REAL[:23], GENERATED)
    reference = KernelInceptionDistance(feature=Pixels(4), subsets=1, subset_size=23)
    reference.update(REAL[:23], real=True)
    reference.update(GENERATED, real=False)
    expected = float(reference.compute()[0])
    assert found["kernel_distance"] == pytest.approx(expected, abs=1e-6)


def test_kernel_distance_goes_through_its_matrix_in_pieces(monkeypatch):
    whole, _ = score(Pixels(4), REAL, GENERATED)
    monkeypatch.setattr("modules.gan_scores._ROWS_AT_ONCE", 4)
    assert score(Pixels(4), REAL, GENERATED)[0] == pytest.approx(whole)


def test_scores_are_called_fid_and_kid_with_inception_alone():
    found, scores = score(Pixels(4, is_inception=True), REAL, GENERATED)
    assert {*found} == {*scores.signatures} == {"fid", "kid"}
    found, scores = score(Pixels(4), REAL, GENERATED)
    assert {*found} == {*scores.signatures} == {"frechet_distance", "kernel_distance"}
    assert all("features:pixels|real:31|generated:23|" in s for s in scores.signatures.values())


def test_real_images_are_kept_for_the_next_evaluation_of_their_split():
    first, scores = score(Pixels(4), REAL, GENERATED)
    num_seen = scores.extractor.num_seen
    scores.reset()
    scores.prepare("val", None, None)
    scores.update(REAL, is_real=True)
    assert scores.extractor.num_seen == num_seen
    scores.update(GENERATED, is_real=False)
    assert scores.compute() == pytest.approx(first)
    scores.reset()
    scores.prepare("test", None, None)
    scores.update(REAL[:20], is_real=True)
    scores.update(GENERATED, is_real=False)
    other, _ = score(Pixels(4), REAL[:20], GENERATED)
    assert scores.compute() == pytest.approx(other)
    assert other != pytest.approx(first)


def test_only_the_extractor_is_in_the_state():
    _, scores = score(Pixels(4), REAL, GENERATED)
    assert not scores.state_dict()
    with_network = Pixels(4)
    with_network.layer = torch.nn.Linear(2, 2)
    scores = ImageScores(with_network)
    assert {*scores.state_dict()} == {"extractor.layer.weight", "extractor.layer.bias"}
    assert not any(parameter.requires_grad for parameter in scores.parameters())


def test_impossible_evaluations_are_refused():
    with pytest.raises(ValueError, match="there are 31 real and 1 generated images"):
        score(Pixels(4), REAL, GENERATED[:1])
    with pytest.raises(ValueError, match=r"num_features=5 -> pixels gives .* shape \[7, 4\]"):
        score(Pixels(5), REAL, GENERATED)
    with pytest.raises(ValueError, match="extractor=Flatten -> it has no num_features"):
        ImageScores(torch.nn.Flatten())


def test_real_digits_are_nearer_to_each_other_than_to_noise():
    images, labels = digits(8)
    classifier = ClassifierFeatures(
        channels=1, resolution=8, num_classes=10, training_images=1000, training_steps=300, seed=1
    )
    scores = ImageScores(classifier)
    found = []
    for generated in (images[1400:], noise(397, 1, 8, 8)):
        scores.prepare("val", lambda n: (images[:n], labels[:n]), lambda weights: weights)
        scores.update(images[1000:1400], is_real=True)
        scores.update(generated, is_real=False)
        found.append(scores.compute())
        scores.reset()
    same, other = found
    for name in same:
        assert math.isfinite(other[name])
        assert other[name] > 20 * abs(same[name])


def test_ranks_with_uneven_shares_score_as_one(tmp_path):
    start_ranks("tests.modules.gan_score_ranks", [str(tmp_path)], 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    alone, scores = score(Pixels(4), REAL, GENERATED)
    for name in SHARES:
        for found in (*first[name], *second[name]):
            assert found == pytest.approx(alone, rel=1e-9, abs=1e-12)
    assert first["signatures"] == second["signatures"] == scores.signatures
    assert first["classifier"] == second["classifier"] != 0
