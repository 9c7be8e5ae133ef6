"""`PlainBiDVL` on the networks of a `BiDVL` of this library, as they are or written out plainly."""

from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrize

from benchmarks.competitors.transcription import PlainBiDVL
from bilevel.methods import BiDVL, Training


def same_networks(model: BiDVL, training: Training, *, one_pass: bool = False) -> PlainBiDVL:
    """The plain loop, which trains the model's own networks."""
    decay = training.lower_weight_decay
    return PlainBiDVL(
        model.get_submodule("upper.energy"),
        model.get_submodule("lower.posterior"),
        model.get_submodule("lower.generator"),
        torch.optim.Adam(model.upper.parameters(), training.upper_lr, training.betas),
        torch.optim.Adam(
            model.lower.parameters(), training.lower_lr, training.betas, weight_decay=decay
        ),
        model.ratio,
        model.latent_weight,
        one_pass,
    )


def write_out(model: nn.Module) -> None:
    """Every convolution computed as one, torch's own spectral norm, contiguous parameters; in place."""
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            module.forward = partial(nn.Conv2d.forward, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.ConvTranspose2d):
            module.forward = partial(nn.ConvTranspose2d.forward, module)  # type: ignore[method-assign]
        if parametrize.is_parametrized(module, "weight"):
            _torch_spectral_norm(module)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _torch_spectral_norm(module: nn.Module) -> None:
    """In the place of this library's, at the same point of the power iteration."""
    ours = module.get_submodule("parametrizations.weight.0")
    u, v = ours.get_buffer("_u").clone(), ours.get_buffer("_v").clone()
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    nn.utils.parametrizations.spectral_norm(module)
    if isinstance(module, nn.Conv2d):  # theirs has the channels before the pixels
        _, inputs, height, width = module.weight.shape
        v = v.view(height, width, inputs).permute(2, 0, 1).flatten()
    theirs = module.get_submodule("parametrizations.weight.0")
    with torch.no_grad():
        theirs.get_buffer("_u").copy_(u)
        theirs.get_buffer("_v").copy_(v)
