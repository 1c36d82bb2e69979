"""Losses of GANs, and penalties on the gradient of the discriminator.

Legend: B images of C channels, H rows and W columns; x a real image, y = G(z) a generated one, D(.)
the logit of the discriminator, s(t) = log(1 + exp t) softplus.

| name | discriminator minimises | generator minimises |
|---|---|---|
| `saturating` | s(-D(x)) + s(D(y)) | -s(D(y)) |
| `non_saturating` | s(-D(x)) + s(D(y)) | s(-D(y)) |
| `hinge` | max(0, 1 - D(x)) + max(0, 1 + D(y)) | -D(y) |
| `least_squares` | ((D(x) - 1)^2 + D(y)^2) / 2 | (D(y) - 1)^2 / 2 |
| `wasserstein` | D(y) - D(x) | -D(y) |
| `relativistic` | s(D(y) - D(x)) | s(D(x) - D(y)) |

Sources: `saturating` Goodfellow et al. 2014, arXiv 1406.2661, equation 1, with D before its
sigmoid; `non_saturating` the end of section 3 there; `hinge` Lim and Ye 2017, arXiv 1705.02894,
and Miyato et al. 2018, arXiv 1802.05957, equations 16 and 17; `least_squares` Mao et al. 2016,
arXiv 1611.04076, equation 9; `wasserstein` Arjovsky et al. 2017, arXiv 1701.07875, algorithm 1;
`relativistic` Jolicoeur-Martineau 2018, arXiv 1807.00734, "RSGAN", and Huang et al. 2024, arXiv
2501.05441, equation 2, each real image paired with the generated one of the same row.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from modules.keyed_draws import uniform

NEEDS_REAL = frozenset({"relativistic"})
"""Losses whose generator is compared with real images."""

_DISCRIMINATOR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "saturating": lambda real, fake: softplus(-real) + softplus(fake),
    "non_saturating": lambda real, fake: softplus(-real) + softplus(fake),
    "hinge": lambda real, fake: relu(1 - real) + relu(1 + fake),
    "least_squares": lambda real, fake: ((real - 1).square() + fake.square()) / 2,
    "wasserstein": lambda real, fake: fake - real,
    "relativistic": lambda real, fake: softplus(fake - real),
}
_GENERATOR: dict[str, Callable[[Tensor], Tensor]] = {
    "saturating": lambda fake: -softplus(fake),
    "non_saturating": lambda fake: softplus(-fake),
    "hinge": lambda fake: -fake,
    "least_squares": lambda fake: (fake - 1).square() / 2,
    "wasserstein": lambda fake: -fake,
}
LOSSES = tuple(_DISCRIMINATOR)


def check_loss(name: str) -> None:
    """Check `module.loss.name`.

    Raises:
        ValueError: It is unknown.
    """
    if name not in LOSSES:
        raise ValueError(f"module.loss.name={name} -> unknown -> choose one of {', '.join(LOSSES)}")


def discriminator_loss(name: str, real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the discriminator.

    Args:
        name: One of `LOSSES`.
        real: [B], D(x).
        fake: [B], D(y).

    Returns:
        fp32 [B].
    """
    return _DISCRIMINATOR[name](real.float(), fake.float())


def generator_loss(name: str, fake: Tensor, real: Tensor | None = None) -> Tensor:
    """Loss of the generator.

    Args:
        name: One of `LOSSES`.
        fake: [B], D(y).
        real: [B], D(x), for losses of `NEEDS_REAL` alone.

    Returns:
        fp32 [B].
    """
    if name in NEEDS_REAL:
        assert real is not None
        # Paired like the discriminator's, with the two in each other's place.
        return _DISCRIMINATOR[name](fake.float(), real.float())
    return _GENERATOR[name](fake.float())


def squared_gradient(logits: Tensor, images: Tensor) -> Tensor:
    """|grad D|^2 of each image, to be differentiated again.

    Times gamma / 2 it is R1 at real images and R2 at generated ones, Mescheder et al. 2018, arXiv
    1801.04406, equations 9 and 10. To be computed in fp32, outside of autocast.

    Args:
        logits: [B], each a function of its own image alone.
        images: [B, C, H, W], of which the logits are a function; requires a gradient.

    Returns:
        [B], of the dtype of the images.
    """
    return _gradient(logits, images).square().sum(1)


def gradient_norm_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """(|grad D| - 1)^2 of each image, to be differentiated again.

    Gulrajani et al. 2017, arXiv 1704.00028, equation 3, without its lambda. A gradient of zero
    costs 1 and gives no direction.

    Args:
        logits: As for `squared_gradient`.
        images: As for `squared_gradient`, of `interpolate`.

    Returns:
        [B], of the dtype of the images.
    """
    return (torch.linalg.vector_norm(_gradient(logits, images), dim=1) - 1).square()


def _gradient(logits: Tensor, images: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.flatten(1)  # [B, CHW]


def interpolate(real: Tensor, fake: Tensor, keys: Tensor, purpose: int) -> Tensor:
    """Draw a point between each real image and the generated one of the same row.

    Gulrajani et al. 2017, arXiv 1704.00028, algorithm 1, line 6.

    Args:
        real: [B, C, H, W].
        fake: [B, C, H, W].
        keys: int64 [B].
        purpose: Of the draw, as `modules.keyed_draws`.

    Returns:
        [B, C, H, W], without a history.
    """
    share = uniform(keys, purpose, 1, 1, 1).to(real.dtype)
    return torch.lerp(fake.detach().to(real.dtype), real.detach(), share)


def lazy_rates(lr: float, betas: Sequence[float], every: int) -> tuple[float, tuple[float, float]]:
    """Rates of Adam for a penalty that takes a step of its own after every k steps of the loss.

    With c = k / (k + 1), c lr and beta^c: k + 1 steps move and forget as k did without it. Karras
    et al. 2020, arXiv 1912.04958, appendix B, where the penalty is also weighted by k. Where it is
    added to the loss of every k-th step instead, there is nothing to make up for.

    Args:
        lr: Learning rate.
        betas: Of the two moments.
        every: k, 1 or more.
    """
    share = every / (every + 1)
    return lr * share, (betas[0] ** share, betas[1] ** share)
