"""The one place where strings become classes: methods, machines, solvers and linear solvers.

The command line, the suite and the presets look names up here and nowhere else. A new method is one
line in `METHODS`; with `for_images` it becomes a command of `bilevel train`, with `for_machine` a method
of the suite. Objects that are not of this package are given as `own`, by the name they go by.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar, final

import torch

from bilevel import (
    EKFAC,
    GMRES,
    KFAC,
    MINRES,
    Alternating,
    BiCGStab,
    Cholesky,
    ConjugateGradient,
    FixedPoint,
    Identity,
    Implicit,
    LinearSolver,
    Neumann,
    NormalCG,
    Nystrom,
    Solver,
    Unrolled,
    solvers,
)
from bilevel.methods.advil import AdvIL
from bilevel.methods.bidvl import BiDVL
from bilevel.methods.bism import BiSM
from bilevel.methods.contrastive_divergence import ContrastiveDivergence
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.general_bidvl import GeneralBiDVL
from bilevel.methods.machines import MACHINES, BoltzmannMachine
from bilevel.methods.maximum_likelihood import MaximumLikelihood
from bilevel.methods.noise_contrastive import NoiseContrastive
from bilevel.methods.score_matching import ScoreMatching
from bilevel.methods.vae import VAE, Visible
from bilevel.methods.vages import VaGES
from bilevel.refusals import nearest, shown

AnyEntry = TypeVar("AnyEntry")
Made = TypeVar("Made")
Own: TypeAlias = Mapping[str, Any]
"""Objects that are not of this package, by the names they go by in a configuration."""

NOTHING: Own = MappingProxyType({})


@final
@dataclass(frozen=True)
class Method:
    """A method, and how it is made of plain values.

    Attributes:
        kind: its class.
        for_images: takes (channels, side, side), a `seed` and options, and builds the networks; `None`
            if the method has none for images.
        for_machine: takes a Boltzmann machine and options; `None` if the method trains none.
        draws_weights: whether `for_machine` has networks, whose weights it draws with a `generator`.
    """

    kind: type[EBLVM]
    for_images: Callable[..., EBLVM] | None = None
    for_machine: Callable[..., EBLVM] | None = None
    draws_weights: bool = False


def _vae_beside(
    machine: BoltzmannMachine,
    *,
    latent_dim: int | None = None,
    hidden: Sequence[int] = (200, 200),
    visible: Visible | None = None,
    grey: bool | None = None,
    generator: torch.Generator,
) -> VAE:
    """A VAE for the rows that a machine takes; by default with as many latents as its last layer."""
    gaussian = machine.visible_range is None
    usual: Visible = "gaussian" if gaussian else "bernoulli"
    return VAE.for_table(
        machine.visible_dim,
        machine.latent_dims[-1] if latent_dim is None else latent_dim,
        hidden=hidden,
        visible=usual if visible is None else visible,
        grey=(not gaussian and not machine.binary) if grey is None else grey,
        generator=generator,
    )


METHODS: Mapping[str, Method] = {
    method.kind.__name__: method
    for method in (
        Method(BiDVL, for_images=BiDVL.for_images),
        Method(GeneralBiDVL, for_machine=GeneralBiDVL),
        Method(AdvIL, for_images=AdvIL.for_images, for_machine=AdvIL),
        Method(BiSM, for_images=BiSM.for_images, for_machine=BiSM),
        Method(VaGES, for_images=VaGES.for_images, for_machine=VaGES),
        Method(MaximumLikelihood, for_machine=MaximumLikelihood),
        Method(ContrastiveDivergence, for_machine=ContrastiveDivergence),
        Method(ScoreMatching, for_images=ScoreMatching.for_images, for_machine=ScoreMatching),
        Method(NoiseContrastive, for_machine=NoiseContrastive),
        Method(VAE, for_images=VAE.for_images, for_machine=_vae_beside, draws_weights=True),
    )
}
"""Methods by the name of the class."""

SOLVERS: Mapping[str, type[Solver]] = {
    make.__name__.lower(): make
    for make in (
        *(Alternating, Implicit, Unrolled),
        *(solvers.DARTS, solvers.SAMA, solvers.IAPTT, solvers.EvolutionStrategies, solvers.PZOBO),
        *(solvers.F2SA, solvers.F2SAp, solvers.F2BA, solvers.BOME, solvers.VPBGD, solvers.GPBGD),
        *(
            solvers.RTHO,
            solvers.MEHA,
            solvers.BDA,
            solvers.SOBA,
            solvers.SABA,
            solvers.SRBA,
            solvers.MASOBA,
        ),
        *(
            solvers.AmIGO,
            solvers.StocBiO,
            solvers.FSLA,
            solvers.SUSTAIN,
            solvers.MRBO,
            solvers.TTSA,
        ),
    )
}
"""Ways to compute the hypergradient, by the name of the class in small letters."""

LINEAR_SOLVERS: Mapping[str, type[LinearSolver]] = {
    "conjugate_gradient": ConjugateGradient,
    "neumann": Neumann,
    "gmres": GMRES,
    "minres": MINRES,
    "bicgstab": BiCGStab,
    "normal_cg": NormalCG,
    "fixed_point": FixedPoint,
    "nystrom": Nystrom,
    "kfac": KFAC,
    "ekfac": EKFAC,
    "identity": Identity,
    "cholesky": Cholesky,
}
"""Ways in which `Implicit` solves its linear system."""

IMAGE_METHODS: Mapping[str, Method] = {
    name.lower(): method for name, method in METHODS.items() if method.for_images is not None
}
"""Methods that build networks for images, by the name they have on the command line."""

_OBJECTS = frozenset(("model", "energy", "posterior", "joint", "generator"))  # no plain values


def pick(what: str, name: str, known: Mapping[str, AnyEntry]) -> AnyEntry:
    """The entry of that name.

    Args:
        what: it is, such as "method".
        name: of it.
        known: all entries by name.

    Raises:
        ValueError: if there is none, with the nearest name there is.

    Example:
        >>> pick("linear solver", "newmann", LINEAR_SOLVERS)
        Traceback (most recent call last):
            ...
        ValueError: there is no linear solver `newmann`; did you mean `neumann`?
    """
    if name not in known:
        raise ValueError(f"there is no {what} `{name}`; {nearest(str(name), known)}")
    return known[name]


def construct(
    name: str, make: Callable[..., Made], options: Mapping[str, Any], *given: Any, **objects: Any
) -> Made:
    """`make(*given, **options, **objects)`.

    Args:
        name: what to call it in a refusal.
        make: a class or function.
        options: plain values from a configuration.
        *given: its first arguments.
        **objects: further arguments that no configuration can hold.

    Raises:
        ValueError: for an option it does not have, with the nearest that it has.
    """
    known = [option for option in arguments(make)[len(given) :] if option not in _OBJECTS]
    for option in options:
        if option not in known and not _takes_any(make):
            hint = nearest(option, known) if known else "it takes none"
            raise ValueError(f"`{name}` has no option `{option}`; {hint}")
    return make(*given, **options, **objects)


def of_own(
    name: str,
    kind: type[Made],
    make: Any,
    options: Mapping[str, Any],
    *given: Any,
    seed: int | None = None,
) -> Made:
    """What an object of somebody's own is, or makes.

    Args:
        name: what it goes by.
        kind: the class that is needed.
        make: a class or a function that takes what is given, then the options; or, where nothing is
            given, the object itself.
        options: plain values from a configuration.
        *given: its first arguments.
        seed: given as `seed`, or as a `generator`, to what has such an argument.

    Raises:
        ValueError: if it is or makes something else, has no such option, or raises.
    """
    needed = f"is needed: a subclass of `{kind.__name__}`, or a function that returns one"
    if isinstance(make, kind) and not inspect.isclass(make):
        if given or options:
            raise ValueError(
                f"`{name}` is a `{type(make).__name__}` that was made already, and every cell makes its "
                "own; give the class, or a function that makes one"
            )
        return make
    if not callable(make) or (inspect.isclass(make) and not issubclass(make, kind)):
        raise ValueError(f"`{name}` is {shown(make)}, and something else {needed}")
    made = called(name, make, options, *given, seed=seed)
    if not isinstance(made, kind):
        raise ValueError(f"`{name}` made {shown(made)}, and something else {needed}")
    return made


def called(
    name: str,
    make: Callable[..., Any],
    options: Mapping[str, Any],
    *given: Any,
    seed: int | None = None,
) -> Any:
    """What somebody's own class or function makes.

    Args:
        name: what it goes by.
        make: the class or function.
        options: plain values from a configuration.
        *given: its first arguments.
        seed: given as `seed`, or as a `generator`, to what has such an argument.

    Raises:
        ValueError: if it has no such option, or raises anything.
    """
    try:
        taken = set(arguments(make)).difference(options)
        objects: dict[str, Any] = {"seed": seed} if seed is not None and "seed" in taken else {}
        if seed is not None and "generator" in taken:
            objects["generator"] = torch.Generator().manual_seed(seed)
        return construct(name, make, options, *given, **objects)
    except Exception as error:  # whatever it is, the sentence is about `name`
        if isinstance(error, ValueError) and str(error).startswith(f"`{name}`"):
            raise
        raise ValueError(f"`{name}` raised {type(error).__name__}: {error}") from error


def _takes_any(make: Callable[..., Any]) -> bool:
    kinds = {parameter.kind for parameter in inspect.signature(make).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


def arguments(make: Callable[..., Any]) -> list[str]:
    """Names of the arguments that a class or function takes."""
    return list(inspect.signature(make).parameters)


def needed(make: Callable[..., Any]) -> list[str]:
    """Names of the arguments that it must be given."""
    known = inspect.signature(make).parameters.values()
    return [parameter.name for parameter in known if parameter.default is parameter.empty]


def make_machine(
    kind: str, options: Mapping[str, Any], visible_dim: int, seed: int = 0, own: Own = NOTHING
) -> BoltzmannMachine:
    """A Boltzmann machine from plain values.

    Args:
        kind: a name in `MACHINES`.
        options: of its constructor.
        visible_dim: width of its visibles.
        seed: of its weights.
        own: kinds that are not of this package: each takes the width, then its options.

    Raises:
        ValueError: for a name or an option there is not, or a value out of range.
    """
    if kind in own:
        base: Any = BoltzmannMachine  # abstract, which is right here
        machine: BoltzmannMachine = of_own(kind, base, own[kind], options, visible_dim, seed=seed)
        if machine.visible_dim != visible_dim:
            raise ValueError(
                f"`{kind}` made a machine of {machine.visible_dim} visibles for rows of {visible_dim}"
            )
        return machine
    generator = torch.Generator().manual_seed(seed)
    return construct(kind, pick("model", kind, MACHINES), options, visible_dim, generator=generator)


def make_for_machine(
    name: str,
    options: Mapping[str, Any],
    machine: BoltzmannMachine,
    seed: int = 0,
    own: Own = NOTHING,
) -> EBLVM:
    """A method that trains a Boltzmann machine, from plain values.

    Args:
        name: a name in `METHODS`.
        options: of its constructor.
        machine: what it trains, or (`VAE`) what it stands beside.
        seed: of the weights of networks.
        own: methods that are not of this package: each takes the machine, then its options.

    Raises:
        ValueError: for a name or an option there is not, or a value out of range.
    """
    if name in own:
        base: Any = EBLVM
        learner: EBLVM = of_own(name, base, own[name], options, machine, seed=seed)
        return learner
    makers = {n: method for n, method in METHODS.items() if method.for_machine is not None}
    method = pick("method", name, makers)
    assert method.for_machine is not None
    objects = {"generator": torch.Generator().manual_seed(seed)} if method.draws_weights else {}
    return construct(name, method.for_machine, options, machine, **objects)


def make_solver(settings: Mapping[str, Any], own: Own = NOTHING) -> Solver:
    """A solver from plain values: its kind and arguments.

    Args:
        settings: `kind`, and its arguments.
        own: kinds that are not of this package: solvers, classes of them, or functions.

    Raises:
        ValueError: for a name or an argument there is not, or a value out of range.

    Example:
        >>> make_solver({"kind": "implicit", "linear_solver": "cholesky", "damping": 0.1})
        Implicit(linear_solver=Cholesky(damping=0.1, max_size=5000, rtol='auto'))
    """
    options = dict(settings)
    kind = options.pop("kind", "alternating")
    if kind in own:
        return of_own(kind, Solver, own[kind], options)  # type: ignore[type-abstract]
    make = pick("solver", kind, SOLVERS)
    if make is not Implicit:
        return construct(kind, make, options)
    name = options.pop("linear_solver", "conjugate_gradient")
    return Implicit(construct(name, pick("linear solver", name, LINEAR_SOLVERS), options))
