"""Hooks that users put on parameters: what `.backward()` would call, called where `train` steps.

Gradients of a hypergradient are taken at tensors in the places of the parameters, where no hook is.
`train` calls the hooks on the gradient an optimizer is given, as a plain loop does; a solver that
differentiates the lower gradient cannot, for a hook would act on products with the Hessian too.
"""

import torch
from torch import Tensor

from bilevel.tree import Tree


def first_hook(variables: Tree) -> tuple[str, str] | None:
    """The name of a variable that has a hook, and how the hook was registered."""
    for name, variable in variables.items():
        if variable._backward_hooks:
            return name, "register_hook"
        if variable._post_accumulate_grad_hooks:
            return name, "register_post_accumulate_grad_hook"
    return None


def refuse_hooks(variables: Tree, solver: str) -> None:
    """Refuse hooks on lower variables whose gradient is differentiated.

    Raises:
        ValueError: naming the variable and the kind of hook.
    """
    found = first_hook(variables)
    if found is not None:
        name, kind = found
        raise ValueError(
            f"`{solver}` differentiates the lower gradient, but the lower variable `{name}` has a hook "
            f"(`{kind}`) that changes it: the two would not fit together. Remove the hook and do the "
            "same in the loss (a mask times the variable, say), or use `Alternating()`"
        )


@torch.no_grad()
def hooked(parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
    """The gradient as the parameter's own hooks leave it."""
    for hook in (parameter._backward_hooks or {}).values():
        changed = hook(gradient) if gradient is not None else None
        gradient = gradient if changed is None else changed
    return gradient


@torch.no_grad()
def accumulated(parameter: Tensor) -> None:
    """Call the hooks that wait for `.grad` to be there."""
    hooks = parameter._post_accumulate_grad_hooks
    for hook in list(hooks.values()) if hooks and parameter.grad is not None else ():
        hook(parameter)
