"""The networks of BiDVL by image shape: sizes, shapes, normalisation, precision."""

import torch

from bilevel.methods.networks import JointEnergy, parameter_count


def test_joint_energy_has_the_published_parameters():
    assert parameter_count(JointEnergy((3, 32, 32), 100)) == 8_701_633


def test_joint_energy_depends_on_images_and_latents():
    generator = torch.Generator().manual_seed(0)
    energy = JointEnergy((1, 8, 8), 3, width=4).double()
    v = torch.rand(5, 1, 8, 8, generator=generator, dtype=torch.float64).requires_grad_()
    h = torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    energies = energy(v, h)
    assert energies.shape == (5,)
    assert energies.min() >= 0
    for gradient in torch.autograd.grad(energies.sum(), (v, h)):
        assert (gradient.flatten(1).norm(dim=1) > 0).all()
