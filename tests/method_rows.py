"""The rows of `test_contract_methods.py`: every method in every form, tiny and in float64."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.methods import (
    DBM,
    EBLVM,
    RBM,
    VAE,
    AdvIL,
    BiDVL,
    BiSM,
    ContrastiveDivergence,
    GaussianDBM,
    GaussianRBM,
    GeneralBiDVL,
    MaximumLikelihood,
    NoiseContrastive,
    ScoreMatching,
    VaGES,
)
from bilevel.methods.machines import MAX_UNITS
from bilevel.methods.variational import (
    DecoupledEnergy,
    GaussianJoint,
    GaussianPosterior,
    TabularEnergy,
    TabularJoint,
    TabularPosterior,
)

SHAPE, WIDTH, LATENT, STATES = (1, 8, 8), 5, 2, (4, 3)
QUICK = (1, 1, 1)  # Langevin steps


def rng(seed: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


# ---------------------------------------------------------------------- data


def bits(n: int) -> Tensor:
    return torch.bernoulli(torch.full((n, WIDTH), 0.4, dtype=torch.float64), generator=rng())


def greys(n: int) -> Tensor:
    return torch.rand(n, WIDTH, generator=rng(), dtype=torch.float64)


def reals(n: int) -> Tensor:
    return torch.randn(n, WIDTH, generator=rng(), dtype=torch.float64)


def pictures(n: int) -> Tensor:
    return torch.rand(n, *SHAPE, generator=rng(), dtype=torch.float64) * 2 - 1


def numbers(n: int) -> Tensor:
    """Row numbers of a table."""
    return torch.arange(n) % STATES[0]


# ---------------------------------------------------------------------- somebody's own modules


def _network(inputs: int, outputs: int, *, bias: bool = True) -> nn.Module:
    """Smooth; an energy has no last bias, which would change it by a constant alone."""
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs, bias=bias))


class Joint(nn.Module):
    """A smooth energy of rows and real latents, with a minimum: (v, h) -> (n,)."""

    def __init__(self) -> None:
        super().__init__()
        self.both = _network(WIDTH + LATENT, 1, bias=False)

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        bowl = v.square().sum(1) + h.square().sum(1)
        energies: Tensor = self.both(torch.cat([v, h], 1)).flatten() + 0.5 * bowl
        return energies


class Marginal(nn.Module):
    """The same of rows alone: v -> (n,)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = _network(WIDTH, 1, bias=False)

    def forward(self, v: Tensor) -> Tensor:
        energies: Tensor = self.rows(v).flatten() + 0.5 * v.square().sum(1)
        return energies


class Moments(nn.Module):
    """Mean and log-variance of the latents of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = _network(WIDTH, 2 * LATENT)

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.rows(v).chunk(2, 1)
        return mean, log_variance


def decoder() -> nn.Module:
    return _network(LATENT, WIDTH)


def posterior() -> GaussianPosterior:
    return GaussianPosterior(Moments(), LATENT)


def joint() -> GaussianJoint:
    return GaussianJoint(decoder(), LATENT, (WIDTH,), 0.5)


def undecoupled() -> dict[str, Any]:
    return {"energy": Joint(), "posterior": posterior(), "joint": joint()}


def three_networks() -> dict[str, Any]:
    return {"energy": Marginal(), "posterior": Moments(), "generator": decoder()}


def tables() -> dict[str, Any]:
    energy, own, both = torch.randn(3, *STATES).double().unbind()
    families = {"posterior": TabularPosterior(own), "joint": TabularJoint(both)}
    return {"energy": TabularEnergy(energy), **families}


def decoupled_tables() -> dict[str, Any]:
    """E(v) - log q1(h|v), its q1 being that of the lower level."""
    own = TabularPosterior(torch.randn(STATES).double())
    marginal = nn.Embedding(STATES[0], 1)
    return {
        "energy": DecoupledEnergy(marginal, own, STATES),
        "posterior": own,
        "joint": TabularJoint(torch.randn(STATES).double()),
    }


def seeded(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Somebody's modules, the same in every call; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


# ---------------------------------------------------------------------- machines


def machine(kind: Any, units: int = 3, **options: Any) -> Any:
    """A machine of moderate weights and biases."""
    model = kind(WIDTH, (units, 2) if kind in (DBM, GaussianDBM) else units, **options)
    generator = rng(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    return model


# ---------------------------------------------------------------------- a row


@dataclass(frozen=True)
class Row:
    """A method in one of its forms, and what does not hold of it, each with the reason.

    Attributes:
        make: builds the untrained model, the same in every call.
        data: visibles, n of them.
        modules: the constructor's modules, which `load` needs again; none where a recipe builds them.
        draws_nothing: why `draw` returns the same whatever its generator.
        stands_still: variables, by the level and a part of their name, that no gradient of their level
            reaches.
        bumpy: levels whose loss is no function that its gradient belongs to.
        mixes: why the loss of a batch is not the mean of its shares' losses.
        not_shared: why a batch is refused to be shared out.
        not_there: what the model refuses to do with a `NotImplementedError`, by the method's name.
        moving: answers that are not functions of the row alone, by the method's name.
        chains: whether `sample` takes arguments of Gibbs chains.
        table: whether its visibles are numbers of the rows of a table.
        defects: checks that fail for now.
    """

    make: Callable[[], EBLVM]
    data: Callable[[int], Tensor]
    modules: Callable[[], dict[str, Any]] | None = None
    draws_nothing: str = ""
    stands_still: Mapping[tuple[str, str], str] = field(default_factory=dict)
    bumpy: Mapping[str, str] = field(default_factory=dict)
    mixes: str = ""
    not_shared: str = ""
    not_there: Mapping[str, str] = field(default_factory=dict)
    moving: Mapping[str, str] = field(default_factory=dict)
    chains: bool = False
    table: bool = False
    defects: Mapping[str, str] = field(default_factory=dict)

    def build(self, device: str = "cpu") -> EBLVM:
        """A model of its own, for the caller to train or spoil."""
        return copy.deepcopy(_first(self.make)).to(device)


@cache
def _first(make: Callable[[], EBLVM]) -> EBLVM:
    return make().double()  # a copy takes less time than making spectral norms


ROWS: dict[str, Row] = {}

MACHINES: dict[str, tuple[Callable[[], Any], Callable[[int], Tensor]]] = {
    "rbm": (lambda: machine(RBM), bits),
    "grey rbm": (lambda: machine(RBM, grey=True), greys),
    "gaussian rbm": (lambda: machine(GaussianRBM), reals),
    "dbm": (lambda: machine(DBM), bits),
    "gaussian dbm": (lambda: machine(GaussianDBM), reals),
}
# So many hidden units that samples are the ends of chains, or that the free energy has too many terms.
LARGE = {
    "large rbm": (lambda: machine(RBM, 13), bits),
    "large dbm": (lambda: machine(DBM, MAX_UNITS + 1), bits),
}
REAL = ("gaussian rbm", "gaussian dbm")


def of_machines(
    name: str, make: Callable[[Any], EBLVM], which: Iterable[str] = MACHINES, **more: Any
) -> None:
    """A row for each machine."""
    for each in which:
        build, data = {**MACHINES, **LARGE}[each]
        ROWS[f"{name}, {each}"] = Row(
            lambda build=build: make(build()), data, **{"chains": True, **more}
        )


def of_images(name: str, kind: Any, options: Mapping[str, Any], **more: Any) -> None:
    """A row of the published networks, as small as they get."""
    ROWS[name] = Row(lambda: kind.for_images(SHAPE, **options), pictures, **more)


def of_modules(
    name: str, kind: Any, modules: Callable[[], dict[str, Any]], data: Any = reals, **more: Any
) -> None:
    """A row of somebody's own modules."""
    options = more.pop("options", {})

    def arguments() -> dict[str, Any]:
        return {**seeded(modules), **options}

    def make() -> EBLVM:
        model: EBLVM = kind(**arguments())
        if data is not numbers:
            model.visible_shape = (WIDTH,)
        return model

    ROWS[name] = Row(make, data, arguments, **more)


# ---------------------------------------------------------------------- BiDVL

CONV = {"latent_dim": LATENT, "width": 2}
STOPPED = {"lower": "variant='offset' stops the gradient at the posterior of samples (Eq. 13)"}
OF_BATCH = {"statistics": "batch"}
BY_COMPANY = dict.fromkeys(
    ("posterior", "reconstruct"), "statistics='batch' makes them depend on company"
)
BATCH_RATIO = "ratio_bias='sigmoid' compares energies with their mean over the batch (Eq. 15)"

of_images("bidvl", BiDVL, CONV, bumpy=STOPPED)
of_images(
    "bidvl complete",
    BiDVL,
    CONV | {"variant": "complete", "ratio_bias": "sigmoid"},
    mixes=BATCH_RATIO,
)
of_images(
    "bidvl without, statistics of the batch",
    BiDVL,
    CONV | OF_BATCH | {"variant": "without", "fresh_latent": True},
    moving=BY_COMPANY,
)
of_images("bidvl resnet", BiDVL, CONV | {"family": "resnet"}, bumpy=STOPPED)
of_modules(
    "bidvl of own modules", BiDVL, three_networks, options={"latent_dim": LATENT}, bumpy=STOPPED
)

# ---------------------------------------------------------------------- GeneralBiDVL

of_machines(
    "general bidvl", GeneralBiDVL.for_model, (*MACHINES, "large dbm"), chains=False
)  # it is sampled by its joint
of_machines(
    "general bidvl symmetric",
    lambda model: GeneralBiDVL.for_model(model, divergence="symmetric", prior="bernoulli"),
    ("rbm", "gaussian rbm", "dbm"),
    chains=False,
)
of_machines(
    "general bidvl by importance",
    lambda model: GeneralBiDVL.for_model(model, divergence="symmetric", reverse="importance"),
    ("rbm", "gaussian dbm"),
    chains=False,
)
of_modules(
    "general bidvl of own modules",
    GeneralBiDVL,
    undecoupled,
)
ENUMERATED = {
    "table": True,
    "draws_nothing": "every state is enumerated",
    "not_there": {"reconstruct": "the mean of states that are numbers is no visible"},
}
of_modules("general bidvl of tables", GeneralBiDVL, tables, numbers, **ENUMERATED)
of_modules(
    "general bidvl of tables, symmetric",
    GeneralBiDVL,
    tables,
    numbers,
    options={"divergence": "symmetric"},
    **ENUMERATED,
)
of_modules(
    "general bidvl of decoupled tables", GeneralBiDVL, decoupled_tables, numbers, **ENUMERATED
)

# ---------------------------------------------------------------------- AdvIL

of_machines("advil", AdvIL)
of_machines("advil with fair coins", lambda model: AdvIL(model, prior="bernoulli"), ("rbm",))
of_images("advil of images", AdvIL, CONV | {"proper": True})
of_modules(
    "advil of own modules",
    AdvIL,
    lambda: {"model": Joint(), "posterior": posterior(), "joint": joint()},
)

# ---------------------------------------------------------------------- BiSM and VaGES


def with_posterior() -> dict[str, Any]:
    return {"model": Joint(), "posterior": posterior()}


DEEP_NETWORKS = {"latent_dim": LATENT, "width": 1, "blocks": 1, "langevin": QUICK}
CHAINS = {"reconstruct": "it is drawn by Langevin dynamics, each row with noise of its own"}
SURROGATE = {
    "upper": "the value is the objective's, the gradient an estimate that holds the covariance, too"
}

THROUGH_THE_RESPONSE = "only the response of the posterior moves it, which the solver adds"
of_machines(
    "bism", BiSM, ("gaussian rbm",), stands_still={("upper", "latent_bias"): THROUGH_THE_RESPONSE}
)
of_machines(
    "bism",
    BiSM,
    ("gaussian dbm",),
    stands_still={("upper", part): THROUGH_THE_RESPONSE for part in ("latent_bias", "weight2")},
)
of_machines(
    "bism, sliced",
    lambda model: BiSM(model, objective="sliced"),
    ("gaussian rbm",),
    stands_still={("upper", "latent_bias"): THROUGH_THE_RESPONSE},
)
of_machines(
    "bism, exact",
    lambda model: BiSM(model, expectation="exact"),
    ("gaussian rbm",),
    stands_still={("upper", "latent_bias"): THROUGH_THE_RESPONSE},
)
of_images("bism of images", BiSM, DEEP_NETWORKS, moving=CHAINS)
of_images("bism of images, kl", BiSM, DEEP_NETWORKS | {"divergence": "kl"}, moving=CHAINS)
of_modules(
    "bism of own modules",
    BiSM,
    with_posterior,
    options={"divergence": "fisher", "langevin": QUICK, "sigma": 0.2},
    moving=CHAINS,
)

of_machines("vages", VaGES, REAL, bumpy=SURROGATE)
of_machines(
    "vages, stein",
    lambda model: VaGES(model, objective="stein", width=1.0, variance_reduced=True),
    ("gaussian rbm",),
    bumpy=SURROGATE,
    not_shared="the kernel compares halves of a batch",
)
of_images(
    "vages of images",
    VaGES,
    DEEP_NETWORKS | {"latent_steps": 2},
    bumpy=SURROGATE,
    moving=CHAINS,
)
of_modules(
    "vages of own modules",
    VaGES,
    with_posterior,
    options={"divergence": "kl", "langevin": QUICK, "sigma": 0.2, "num_samples": 3},
    bumpy=SURROGATE,
    moving=CHAINS,
)

# ---------------------------------------------------------------------- a single level

of_machines("cd", ContrastiveDivergence)
of_machines(
    "pcd",
    lambda model: ContrastiveDivergence(model, 2, persistent=True),
    (*MACHINES, "large rbm"),
)
of_machines(
    "pcd of three chains",
    lambda model: ContrastiveDivergence(model, persistent=True, num_chains=3),
    ("rbm", "gaussian dbm"),
    not_shared="there are more rows than chains",
)
of_machines("maximum likelihood", MaximumLikelihood, draws_nothing="nothing is random")
of_machines("nce", NoiseContrastive)
of_machines(
    "nce, two noise rows",
    lambda model: NoiseContrastive(model, ratio=2),
    ("rbm", "gaussian rbm"),
    not_shared="there are more noise rows than rows",
)

NO_LATENT = dict.fromkeys(("posterior", "reconstruct"), "there is no latent")
of_machines("score matching", ScoreMatching, REAL)
of_machines(
    "score matching, exact",
    lambda model: ScoreMatching(model, objective="exact"),
    REAL,
    draws_nothing="the trace is exact",
)
of_machines(
    "score matching, multiscale",
    lambda model: ScoreMatching(model, objective="multiscale"),
    ("gaussian rbm",),
)
of_images(
    "score matching of images",
    ScoreMatching,
    {"width": 1, "blocks": 1, "langevin": QUICK},
    not_there=NO_LATENT,
)
of_modules(
    "score matching of an own module",
    ScoreMatching,
    lambda: {"model": Marginal()},
    options={"objective": "sliced", "langevin": QUICK},
    not_there=NO_LATENT,
)


def of_table(name: str, data: Any, **options: Any) -> None:
    def make() -> EBLVM:
        return VAE.for_table(WIDTH, LATENT, hidden=[4], **options)

    ROWS[name] = Row(make, data)


of_table("vae", bits)
of_table("vae of greys", greys, grey=True)
of_table("vae of reals", reals, visible="gaussian")
of_images("vae of images", VAE, CONV)
of_images("vae of images, statistics of the batch", VAE, CONV | OF_BATCH, moving=BY_COMPANY)
of_modules(
    "vae of own modules",
    VAE,
    lambda: {"encoder": Moments(), "decoder": decoder(), "latent_dim": LATENT},
    bits,
)
