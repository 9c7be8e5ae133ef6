"""Which layers have right second and third derivatives in this torch, and the setting they need."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm as WeightNorm
from torch.nn.utils.weight_norm import WeightNorm as WeightNormHook

from bilevel.distributed import world_size
from bilevel.sync_batch_norm import BatchNorm, SyncBatchNorm

_NORMS = (
    nn.LayerNorm,
    BatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_WEIGHT_NORMS = (WeightNorm, WeightNormHook)
_ATTENTION = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@runtime_checkable
class PowerIteration(Protocol):
    """What improves singular vectors at every forward pass in training mode.

    torch's spectral norm has this attribute in both its forms, the parametrization and the older hook;
    a parametrization of one's own that has it is at rest, too, while second derivatives are taken.

    Attributes:
        n_power_iterations: iterations per forward pass.
    """

    n_power_iterations: int


@final
@dataclass(frozen=True)
class Finding:
    """A layer whose higher derivatives need care.

    Attributes:
        name: path of the layer in the module.
        layer: its class.
        order: the order of derivative from which on it needs care.
        wrong: whether the derivative is wrong (or missing) there, or merely needs a setting that
            `Implicit` and `Unrolled` make by themselves.
        advice: what happens and what to use instead, one sentence.
    """

    name: str
    layer: str
    order: int
    wrong: bool
    advice: str

    def __str__(self) -> str:
        return f"`{self.name}` ({self.layer}), derivative order {self.order}: {self.advice}"


def check_second_order(module: nn.Module, order: int = 2) -> list[Finding]:
    """Name the layers of a module whose derivatives up to `order` this torch gets wrong.

    Measured with torch 2.13 against finite differences in float64. A hypergradient takes second
    derivatives of the lower loss; third ones appear when a loss itself contains a gradient (score
    matching).

    Args:
        module: the module to walk.
        order: highest derivative that will be taken, 2 or 3.

    Returns:
        One finding per layer, empty if all is well. Functions called in a `forward`
        (`F.layer_norm`, `torch.cdist`) cannot be seen and are not reported.

    Raises:
        ValueError: if `order` is not 2 or 3.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        >>> check_second_order(net)
        []
        >>> print(check_second_order(net, order=3)[0])  # doctest: +ELLIPSIS
        `1` (LayerNorm), derivative order 3: the third derivative is silently wrong; use ...
    """
    if order not in (2, 3):
        raise ValueError(f"`order` must be 2 or 3, got {order!r}")
    found = [f for name, m in module.named_modules() for f in _inspect(name, m)]
    return [finding for finding in found if finding.order <= order]


def _inspect(name: str, module: nn.Module) -> Iterator[Finding]:
    kind = type(module).__name__
    composed = isinstance(module, SyncBatchNorm) and world_size() > 1  # of means
    if isinstance(module, nn.SyncBatchNorm) and module.training and world_size() > 1:
        advice = "torch's synchronised batch norm has no second derivative; use "
        yield Finding(name, kind, 2, True, advice + "`bilevel.sync_batch_norm.SyncBatchNorm`")
    elif (
        isinstance(module, _NORMS)
        and not composed
        and (module.training or isinstance(module, nn.LayerNorm))
    ):
        advice = "the third derivative is silently wrong; use `nn.GroupNorm`, `nn.RMSNorm` or a "
        yield Finding(name, kind, 3, True, advice + "norm composed of mean and variance")
    if _has_weight_norm(module):
        advice = "weight_norm's second derivative is silently wrong; compose g * v / |v| by hand"
        yield Finding(name, kind, 2, True, advice)
    if isinstance(module, nn.EmbeddingBag):
        advice = (
            "torch has no second derivative of it; use `nn.Embedding` and sum or average its rows"
        )
        yield Finding(name, kind, 2, True, advice)
    if _spectral_norms(module):
        advice = "u and v are constants: the function differentiated is W / (u^T W v)"
        yield Finding(name, kind, 2, False, advice)
    if isinstance(module, _ATTENTION):
        yield Finding(
            name, kind, 2, False, "only the math attention kernel is twice differentiable"
        )


def _has_weight_norm(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(p, _WEIGHT_NORMS) for p in (*hooks, *_parametrizations(module)))


def _spectral_norms(module: nn.Module) -> list[nn.Module]:
    """The modules whose training flag turns the power iteration of `module` on."""
    found: list[nn.Module] = [p for p in _parametrizations(module) if isinstance(p, PowerIteration)]
    hooks = module._forward_pre_hooks.values()
    if any(isinstance(hook, PowerIteration) for hook in hooks):
        found.append(module)  # the older hook follows its own layer's flag
    return found


def _parametrizations(module: nn.Module) -> list[nn.Module]:
    if "parametrizations" not in module._modules or not parametrize.is_parametrized(module):
        return []
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    return [p for entry in lists.values() if isinstance(entry, nn.ModuleList) for p in entry]


def differentiable_twice(module: nn.Module, who: str) -> None:
    """Refuse a module with a layer whose second derivative is wrong.

    Raises:
        ValueError: naming the layer and what to use instead.
    """
    wrong = [finding for finding in check_second_order(module) if finding.wrong]
    if wrong:
        raise ValueError(f"`{who}` differentiates the lower loss twice, but {wrong[0]}")


@final
class _Held:
    """A context that begins with the first thread that enters it and ends with the last that leaves."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._inside = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with _lock:
            if not self._inside:
                self._context = self._make()
                self._context.__enter__()
            self._inside += 1
        try:
            yield
        finally:
            with _lock:
                self._inside -= 1
                if not self._inside:
                    self._context.__exit__(None, None, None)


_lock = threading.RLock()
_math_attention = _Held(lambda: sdpa_kernel(SDPBackend.MATH))
_without_cudnn = _Held(lambda: torch.backends.cudnn.flags(enabled=False))
_flags_off: MutableMapping[nn.Module, _Held] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _off(module: "weakref.ref[nn.Module]", flag: str) -> Iterator[None]:
    held = module()
    before = getattr(held, flag)
    setattr(held, flag, False)
    try:
        yield
    finally:
        setattr(held, flag, before)


@contextlib.contextmanager
def second_order_context(module: nn.Module) -> Iterator[None]:
    """Make every layer twice differentiable: math attention, no cuDNN, power iterations at rest.

    Spectral norm divides a weight by u^T W v and improves u and v at every forward pass in training
    mode. At rest, u and v are constants and the loss is a smooth function of the weights, the same
    one for every product; `train` advances them once a step. Embeddings with sparse gradients give
    dense ones: torch cannot carry sparse ones through the steps of an optimizer.
    """
    layers = list(module.modules())
    flags = [(s, "training") for m in layers for s in _spectral_norms(m)]
    flags += [(m, "sparse") for m in layers if isinstance(m, nn.Embedding) and m.sparse]
    recurrent = any(isinstance(m, nn.RNNBase) for m in layers)
    with contextlib.ExitStack() as stack:
        for owner, flag in flags:
            with _lock:
                make = partial(_off, weakref.ref(owner), flag)
                held = _flags_off.setdefault(owner, _Held(make))
            stack.enter_context(held())
        stack.enter_context(_math_attention())
        if recurrent and torch.backends.cudnn.is_available():
            stack.enter_context(_without_cudnn())
        yield
