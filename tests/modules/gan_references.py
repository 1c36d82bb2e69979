"""The networks of the GAN family written again, of plain torch, as their papers describe them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.gan_networks import build_networks

State = dict[str, Tensor]


def build(preset, *, resolution, channels=1, num_classes=None, seed=3, **overrides) -> Any:
    return build_networks(
        preset,
        overrides,
        resolution=resolution,
        channels=channels,
        num_classes=num_classes,
        seed=seed,
    )


def stir(network):
    """Moves every parameter, so that none that starts at 0 or 1 hides an error."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=0.1)
    return network


def normalise(x: Tensor, state: State, name: str, epsilon: float, labels=None) -> Tensor:
    """Batch norm of training; with labels, the gains and biases of classes."""
    dims = [0, *range(2, x.dim())]
    centred = x - x.mean(dims, keepdim=True)
    normalised = centred / (centred.square().mean(dims, keepdim=True) + epsilon).sqrt()
    gain, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    if labels is not None:
        gain, bias = gain[labels], bias[labels]
    for _ in dims[1:]:
        gain, bias = gain[..., None], bias[..., None]
    return normalised * gain + bias


# -- DCGAN, as Keras has it ------------------------------------------------------------------------


def turned(value: Tensor) -> Tensor:
    return value.flip((-2, -1))


def keras_transposed(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """`Conv2DTranspose(padding="same")`: the whole result, cut where SAME would have padded."""
    whole = F.conv_transpose2d(x, kernel, stride=stride)
    before, size = (1 if stride == 2 else 2), stride * x.size(-1)
    return whole[..., before : before + size, before : before + size]


def dcgan_generator(state: State, noise: Tensor, labels=None) -> Tensor:
    if labels is not None:
        noise = torch.cat([noise, state["embedding.weight"][labels]], dim=1)
    x = noise @ state["dense.weight"].T
    x = F.leaky_relu(normalise(x, state, "norm", 1e-3), 0.3)
    channels = state["layers.0.conv.weight"].size(0)
    side = round((x.size(1) // channels) ** 0.5)
    x = turned(x.view(-1, channels, side, side))
    for layer in range(sum(key.endswith("conv.weight") for key in state)):
        stride = 1 if side == 7 and layer == 0 else 2
        x = keras_transposed(x, turned(state[f"layers.{layer}.conv.weight"]), stride)
        x = F.leaky_relu(normalise(x, state, f"layers.{layer}.norm", 1e-3), 0.3)
    return turned(torch.tanh(keras_transposed(x, turned(state["output.weight"]), 2)))


def dcgan_discriminator(state: State, images: Tensor, labels=None) -> Tensor:
    x = turned(images)
    for layer in range(sum(key.endswith("conv.weight") for key in state)):
        name = f"layers.{layer}.conv"
        x = F.pad(x, (1, 2, 1, 2))  # Keras' SAME
        x = F.conv2d(x, turned(state[f"{name}.weight"]), state[f"{name}.bias"], stride=2)
        x = F.leaky_relu(x, 0.3)
    features = turned(x).flatten(1)
    head = state["dense.weight"]
    if labels is not None:  # a row of weights for each class
        head = head + state["embedding.weight"][labels]
    return (features * head).sum(1) + state["dense.bias"]


# -- SNGAN -----------------------------------------------------------------------------------------


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def halved(x: Tensor) -> Tensor:
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))


def conv(x: Tensor, state: State, name: str) -> Tensor:
    weight = state[f"{name}.weight"]
    if f"{name}.spectral_norm.u" in state:
        weight = weight / sigma(state, name)
    return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.size(-1) // 2)


def sigma(state: State, name: str) -> Tensor:
    u, v = state[f"{name}.spectral_norm.u"], state[f"{name}.spectral_norm.v"]
    return torch.einsum("i,ij,j", u, state[f"{name}.weight"].flatten(1), v)


def sngan_generator(state: State, noise: Tensor, labels=None) -> Tensor:
    x = noise @ state["dense.weight"].T + state["dense.bias"]
    x = x.view(noise.size(0), -1, 4, 4)
    for layer in range(sum(key.endswith("conv1.weight") for key in state)):
        name = f"layers.{layer}"
        hidden = normalise(x, state, f"{name}.norm1", 2e-5, labels).relu()
        hidden = conv(doubled(hidden), state, f"{name}.conv1")
        hidden = normalise(hidden, state, f"{name}.norm2", 2e-5, labels).relu()
        x = conv(hidden, state, f"{name}.conv2") + conv(doubled(x), state, f"{name}.shortcut")
    return torch.tanh(conv(normalise(x, state, "norm", 2e-5).relu(), state, "output"))


def sngan_discriminator(state: State, images: Tensor, labels=None) -> Tensor:
    x, num_halving = images, 2 if images.size(-1) == 32 else 5
    for layer in range(sum(key.endswith("conv1.weight") for key in state)):
        name = f"layers.{layer}"
        hidden = conv(x if layer == 0 else x.relu(), state, f"{name}.conv1").relu()
        hidden = conv(hidden, state, f"{name}.conv2")
        shortcut = conv(x, state, f"{name}.shortcut") if f"{name}.shortcut.weight" in state else x
        x = hidden + shortcut
        x = halved(x) if layer < num_halving else x
    features = x.relu().sum((2, 3))
    logits = features @ (state["dense.weight"] / sigma(state, "dense"))[0] + state["dense.bias"]
    if labels is not None:
        table = state["embedding.weight"] / sigma(state, "embedding")
        logits = logits + (table[labels] * features).sum(1)
    return logits


# -- R3GAN -----------------------------------------------------------------------------------------


def fir_kernel(channels: int) -> Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    return torch.einsum("i,j->ij", taps, taps).repeat(channels, 1, 1, 1)


def fir_up(x: Tensor) -> Tensor:
    """Zeros after each pixel, then [1, 3, 3, 1] both ways, 4 times as bright."""
    spread = x.new_zeros(*x.shape[:2], 2 * x.size(2), 2 * x.size(3))
    spread[..., ::2, ::2] = x
    # StyleGAN's padding of an upsampling by 2 with 4 taps: 2 before, 1 after.
    return 4 * F.conv2d(F.pad(spread, (2, 1, 2, 1)), fir_kernel(x.size(1)), groups=x.size(1))


def fir_down(x: Tensor) -> Tensor:
    padded = F.pad(x, (1, 1, 1, 1))
    return F.conv2d(padded, fir_kernel(x.size(1)), groups=x.size(1))[..., ::2, ::2]


def r3gan_stage(x: Tensor, state: State, stage: int) -> Tensor:
    for block in range(sum(key.startswith(f"stages.{stage}.") for key in state) // 5):
        name = f"stages.{stage}.{block}"
        weights = [state[f"{name}.conv{i}.weight"] for i in (1, 2, 3)]
        biases = [state[f"{name}.activation{i}.bias"][:, None, None] for i in (1, 2)]
        hidden = F.leaky_relu(
            torch.einsum("oc,bchw->bohw", weights[0][..., 0, 0], x) + biases[0], 0.2
        )
        groups = [  # each group on its own
            F.conv2d(part, weight, padding=1)
            for part, weight in zip(hidden.split(16, 1), weights[1].split(16), strict=True)
        ]
        hidden = F.leaky_relu(torch.cat(groups, dim=1) + biases[1], 0.2)
        x = x + F.conv2d(hidden, weights[2])
    return x


def r3gan_transition(x: Tensor, state: State, index: int) -> Tensor:
    name = f"transitions.{index}.weight"
    return F.conv2d(x, state[name]) if name in state else x


def num_stages(state: State) -> int:
    return len({key.split(".")[1] for key in state if key.startswith("stages.")})


def r3gan_generator(state: State, noise: Tensor, labels=None) -> Tensor:
    if labels is not None:
        one_hot = F.one_hot(labels, state["embedding.weight"].size(0)).to(noise.dtype)
        noise = torch.cat([noise, one_hot @ state["embedding.weight"]], dim=1)
    scales = noise @ state["basis.linear.weight"].T
    x = torch.einsum("chw,bc->bchw", state["basis.basis"], scales)
    for stage in range(num_stages(state)):
        x = x if stage == 0 else fir_up(r3gan_transition(x, state, stage - 1))
        x = r3gan_stage(x, state, stage)
    return F.conv2d(x, state["output.weight"])


def r3gan_discriminator(state: State, images: Tensor, labels=None) -> Tensor:
    x = F.conv2d(images, state["input.weight"])
    for stage in range(num_stages(state)):
        x = x if stage == 0 else r3gan_transition(fir_down(x), state, stage - 1)
        x = r3gan_stage(x, state, stage)
    x = torch.einsum("bchw,chw->bc", x, state["basis.weight"].squeeze(1))
    features = x @ state["linear.weight"].T
    if labels is not None:
        features = features * state["embedding.weight"][labels]
    return features.sum(1)


REFERENCES = {
    "dcgan_tiny": (dcgan_generator, dcgan_discriminator),
    "sngan_tiny": (sngan_generator, sngan_discriminator),
    "r3gan_tiny": (r3gan_generator, r3gan_discriminator),
}
