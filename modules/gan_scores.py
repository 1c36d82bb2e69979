"""Scores of generated images against real ones: distances between their features.

Legend: N images of a kind, C channels, H rows, W columns, F features.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance

_ROWS_AT_ONCE = 1024  # of the kernel's matrix, whose columns are all images


class _GivenFeatures(nn.Module):
    """In place of torchmetrics' Inception: the features are computed once, for all scores."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class KernelDistance(Metric):
    """Unbiased estimate of the squared maximum mean discrepancy of two sets of features.

    With the kernel k(x, y) = (x . y / F + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401, section 3
    and equation 4 of Gretton et al. 2012). KID is a mean over random subsets of 1,000; this one is
    over all pairs at once, which has the same expectation, a lower variance and no draws. In fp64.

    Args:
        num_features: F.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    real: Any
    generated: Any

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features, self.reset_real_features = num_features, False
        self.sizes: dict[str, int] = {}
        """Images of the last `compute`, of all ranks."""
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool) -> None:
        """Add `features` (fp32 [N, F]) of real or of generated images."""
        (self.real if real else self.generated).append(features)

    def compute(self) -> Tensor:
        """Compare what all ranks were given.

        Returns:
            fp64, 0-d; as it is unbiased, below 0 at times.

        Raises:
            ValueError: There are fewer than two images of a kind.
        """
        real, generated = (
            torch.cat([each] if isinstance(each, Tensor) else each).double()
            for each in (self.real, self.generated)
        )
        self.sizes = {"real": len(real), "generated": len(generated)}
        if min(self.sizes.values()) < 2:
            raise ValueError(
                f"module.scores -> there are {len(real)} real and {len(generated)} generated "
                "images to compare -> evaluate at least two"
            )
        within = _mean_kernel(real, real) + _mean_kernel(generated, generated)
        return within - 2 * _mean_kernel(real, generated)

    def reset(self) -> None:
        """Forget generated images, and real ones where `reset_real_features` says so."""
        real = list(self.real)  # Metric.reset empties the list itself
        super().reset()
        if not self.reset_real_features:
            self.real = real


def _mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Mean of k(x_i, y_j), of pairs of different images where `y` is `x`."""
    num_features = x.size(1)
    total = x.new_zeros(())
    for rows in x.split(_ROWS_AT_ONCE):
        total += (rows @ y.T / num_features + 1).pow(3).sum()
    if y is not x:
        return total / (len(x) * len(y))
    total -= (x.square().sum(1) / num_features + 1).pow(3).sum()
    return total / (len(x) * (len(x) - 1))


class ImageScores(nn.Module):
    """Frechet and kernel distance between real and generated images, exact over all ranks.

    They are called `fid` (Heusel et al. 2017, arXiv 1706.08500, equation 6) and `kid` where the
    features are those of Inception, `frechet_distance` and `kernel_distance` elsewhere. Sums are in
    fp64, features are computed once for both, in fp32 whatever the precision of the run.

    `prepare`, `update` with images of both kinds, `compute`, `reset`, and again. Real images are
    kept from one evaluation of a split to the next, so that later ones need not be updated with:
    `update` leaves them out. `compute` is for all ranks at once. Of all this only the weights of
    `extractor` are part of a checkpoint.

    Args:
        extractor: As `modules.gan_features.Features` says.

    Raises:
        ValueError: `extractor` lacks something of it.
    """

    rows = ()
    """What else an evaluation shows (`modules.scores.Generated`): no texts."""

    def __init__(self, extractor: nn.Module):
        super().__init__()
        for name in ("num_features", "name", "is_inception"):
            if name not in dir(extractor):  # not asked for: the weights may have no values yet
                raise ValueError(
                    f"module.scores.extractor={type(extractor).__name__} -> it has no {name} -> "
                    "give it what modules.gan_features.Features asks for"
                )
        self.extractor: Any = extractor.requires_grad_(False)
        self.frechet = FrechetInceptionDistance(
            feature=_GivenFeatures(extractor.num_features),  # type: ignore[arg-type]
            reset_real_features=False,
        )
        self.kernel = KernelDistance(self.extractor.num_features)
        is_inception = self.extractor.is_inception
        self.names = ("fid", "kid") if is_inception else ("frechet_distance", "kernel_distance")
        self.signatures: dict[str, str] = {}
        """How the scores of the last `compute` were computed, by name."""
        self._split: str | None = None
        self._knows_real = False

    def check_monitor(self, monitor: str) -> None:
        """Refuse a `module.monitor` that no validation would log, before one is due.

        Raises:
            ValueError: It is none of the scores.
        """
        known = [f"val/{name}" for name in self.names]
        if monitor not in known:
            raise ValueError(
                f"module.monitor={monitor} -> no score of {self.extractor.name} -> choose "
                f"{' or '.join(known)}"
            )

    def train(self, mode: bool = True) -> "ImageScores":
        """Stay in evaluation mode."""
        return super().train(False)

    def prepare(
        self,
        split: str,
        sample: Callable[[int], tuple[Tensor, Tensor | None]],
        broadcast: Callable[[Any], Any],
    ) -> None:
        """Get ready for an evaluation, on all ranks.

        An extractor that is yet to be trained is trained by rank 0, and the others get its weights.

        Args:
            split: Where the real images are from; kept ones of another are forgotten.
            sample: Gives training images (uint8 [n, C, H, W]) and labels (int64 [n] or None), about
                as many as it is asked for; called on rank 0 alone.
            broadcast: Gives every rank what rank 0 has.
        """
        if split != self._split:
            self._split, self._knows_real = split, False
            for metric in (self.frechet, self.kernel):
                metric.reset_real_features = True
                metric.reset()
                metric.reset_real_features = False
        if not hasattr(self.extractor, "train_on") or self.extractor.is_trained:
            return
        weights = None
        if not dist.is_initialized() or dist.get_rank() == 0:
            self.extractor.train_on(*sample(self.extractor.training_images))
            weights = {name: value.cpu() for name, value in self.extractor.state_dict().items()}
        self.extractor.load_state_dict(broadcast(weights))

    @torch.no_grad()
    def update(self, images: Tensor, *, is_real: bool) -> None:
        """Add images, without those that only pad a batch; any number of them, none too.

        Args:
            images: uint8 [N, C, H, W].
            is_real: Whether they are of the data or generated.

        Raises:
            ValueError: The extractor gives features of another shape than it says.
        """
        if len(images) == 0 or (is_real and self._knows_real):
            return
        with torch.autocast(images.device.type, enabled=False):
            features = self.extractor(images)
        self._add(features, is_real)

    def _add(self, features: Tensor, is_real: bool) -> None:
        expected = self.extractor.num_features
        if features.ndim != 2 or features.size(1) != expected:
            raise ValueError(
                f"module.scores.extractor.num_features={expected} -> {self.extractor.name} gives "
                f"features of shape {list(features.shape)} -> set it to the last of these numbers, "
                "and let the extractor give [images, features]"
            )
        self.kernel.update(features, real=is_real)
        self.frechet.update(features.double(), real=is_real)  # fp64: it answers in that, too

    def compute(self) -> dict[str, float]:
        """Compare the images of all ranks.

        Raises:
            ValueError: There are fewer than two of a kind.
        """
        for is_real in (True, False):  # a rank without images takes part in the exchange
            none = torch.empty(0, self.extractor.num_features, device=self.frechet.device)
            self._add(none, is_real)
        distances = {"kernel": self.kernel.compute(), "frechet": self.frechet.compute()}
        self._knows_real = True
        sizes = "|".join(f"{kind}:{count}" for kind, count in self.kernel.sizes.items())
        facts = f"features:{self.extractor.name}|{sizes}"
        frechet, kernel = self.names
        self.signatures = {
            frechet: f"{facts}|torchmetrics:{version('torchmetrics')}",
            kernel: f"{facts}|unbiased, over all pairs",
        }
        return {frechet: float(distances["frechet"]), kernel: float(distances["kernel"])}

    def reset(self) -> None:
        """Forget generated images."""
        self.frechet.reset()
        self.kernel.reset()
