"""The hypergradients of `benchmarks.compiled_speed` in JAX, jaxopt and optimistix.

Each competitor is one jitted function of everything: upper and lower variables and the data go in, the
gradient in the upper variables comes out. JAX itself is written in several ways, of which the fastest
stands for it. All do the same arithmetic: the same steps from the same start, no stopping early.

Run as a module, it answers the requests of `benchmarks.measuring.worker`. It imports JAX, its libraries
and nothing of this one.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import jaxopt
import lineax as lx
import numpy as np
import optax
import optimistix as optx
from jax import lax
from jax.tree import map as tree_map

from benchmarks.in_jax.problems import Problem, Variables, problem
from benchmarks.measuring.worker import Run, serve

Hypergradient: TypeAlias = Callable[[list[jax.Array], list[jax.Array], Any], Any]
Settings: TypeAlias = Mapping[str, Any]


def dot(a: Variables, b: Variables) -> jax.Array:
    return sum(jax.tree.leaves(tree_map(jnp.vdot, a, b)))


def lower_gradient(p: Problem) -> Callable[..., Variables]:
    """The gradient of the lower loss in the lower variables."""
    return jax.grad(p.lower_loss, argnums=1)


# Unrolling


def by_scan(p: Problem, s: Settings, *, remat: bool = False) -> Hypergradient:
    """Reverse mode through `lax.scan`."""

    def value(x: Variables, y: Variables, data: Any) -> jax.Array:
        def step(state: Any, _: None) -> Any:
            y, m = state
            m = tree_map(lambda m, g: s["momentum"] * m + g, m, lower_gradient(p)(x, y, data))
            return (tree_map(lambda y, m: y - s["lr"] * m, y, m), m), None

        body = jax.checkpoint(step) if remat else step
        start = (y, tree_map(jnp.zeros_like, y))
        (y, _), _ = lax.scan(body, start, length=s["steps"])
        return p.upper_loss(y, data)

    return jax.grad(value)


def by_mixed_scans(p: Problem, s: Settings, unroll: int) -> Hypergradient:
    """The adjoint by hand: a second scan backwards with forward-over-reverse products.

    With m' = mu m + g(x, y) and y' = y - lr m', the adjoints a of y and b of m go back by
    c = b - lr a,  a <- a + (dg/dy)' c,  b <- mu c,  and x gets (dg/dx)' c. Both products are one
    derivative of the gradient in (x, y) along (0, c).
    """
    both = jax.grad(p.lower_loss, argnums=(0, 1))

    def gradient(x: Variables, y: Variables, data: Any) -> Variables:
        def ahead(state: Any, _: None) -> Any:
            y, m = state
            m = tree_map(lambda m, g: s["momentum"] * m + g, m, lower_gradient(p)(x, y, data))
            return (tree_map(lambda y, m: y - s["lr"] * m, y, m), m), y

        def back(state: Any, y: Variables) -> Any:
            a, b, total = state
            c = tree_map(lambda a, b: b - s["lr"] * a, a, b)
            still = tree_map(jnp.zeros_like, x)
            _, (cross, hessian) = jax.jvp(lambda *z: both(*z, data), (x, y), (still, c))
            a = tree_map(jnp.add, a, hessian)
            b = tree_map(lambda c: s["momentum"] * c, c)
            return (a, b, tree_map(jnp.add, total, cross)), None

        start = (y, tree_map(jnp.zeros_like, y))
        (last, _), path = lax.scan(ahead, start, length=s["steps"], unroll=unroll)
        a = jax.grad(p.upper_loss)(last, data)
        state = (a, tree_map(jnp.zeros_like, y), tree_map(jnp.zeros_like, x))
        (_, _, total), _ = lax.scan(back, state, path, reverse=True, unroll=unroll)
        return total

    return gradient


def by_jaxopt_unrolled(p: Problem, s: Settings) -> Hypergradient:
    def value(x: Variables, y: Variables, data: Any) -> jax.Array:
        solver = jaxopt.OptaxSolver(
            fun=lambda y, x: p.lower_loss(x, y, data),
            opt=optax.sgd(s["lr"], s["momentum"]),
            maxiter=s["steps"],
            tol=0.0,
            unroll=True,
        )
        return p.upper_loss(solver.run(y, x).params, data)

    return jax.grad(value)


def by_optimistix_unrolled(p: Problem, s: Settings) -> Hypergradient:
    """A checkpoint per step, the fastest setting: none is computed again."""

    def value(x: Variables, y: Variables, data: Any) -> jax.Array:
        solution = optx.minimise(
            lambda y, x: p.lower_loss(x, y, data),
            optx.OptaxMinimiser(optax.sgd(s["lr"], s["momentum"]), rtol=0.0, atol=0.0),
            y,
            x,
            max_steps=s["steps"],
            adjoint=optx.RecursiveCheckpointAdjoint(checkpoints=s["steps"]),
            throw=False,
        )
        return p.upper_loss(solution.value, data)

    return jax.grad(value)


# Implicit differentiation


def conjugate_gradients(
    operator: Callable[[Variables], Variables], b: Variables, steps: int
) -> Variables:
    """So many steps from zero, without a look at the residual."""

    def step(state: Any, _: None) -> Any:
        w, r, p, rr = state
        ap = operator(p)
        alpha = rr / dot(p, ap)
        w = tree_map(lambda w, p: w + alpha * p, w, p)
        r = tree_map(lambda r, ap: r - alpha * ap, r, ap)
        rr, before = dot(r, r), rr
        return (w, r, tree_map(lambda r, p: r + rr / before * p, r, p), rr), None

    start = (tree_map(jnp.zeros_like, b), b, b, dot(b, b))
    return lax.scan(step, start, length=steps)[0][0]


def by_products(p: Problem, s: Settings, *, linearize: bool) -> Hypergradient:
    """Products by `jax.linearize`, done once, or by `jax.jvp`, each time anew."""

    def gradient(x: Variables, y: Variables, data: Any) -> Variables:
        both = jax.grad(p.lower_loss, argnums=(0, 1))
        still = tree_map(jnp.zeros_like, x)
        if linearize:
            _, along = jax.linearize(lambda y: both(x, y, data), y)
        else:

            def along(c: Variables) -> Any:
                return jax.jvp(lambda *z: both(*z, data), (x, y), (still, c))[1]

        def operator(c: Variables) -> Variables:
            return tree_map(lambda h, c: h + s["damping"] * c, along(c)[1], c)

        v = jax.grad(p.upper_loss)(y, data)
        w = conjugate_gradients(operator, v, s["steps"])
        return tree_map(jnp.negative, along(w)[0])

    return gradient


def by_jaxopt_implicit(p: Problem, s: Settings) -> Hypergradient:
    """`custom_root` with `solve_cg`; the solver function has nothing left to solve."""

    def value(x: Variables, y: Variables, data: Any) -> jax.Array:
        def solve(matvec: Any, b: Any) -> Any:
            ridge = s["damping"] or None
            return jaxopt.linear_solve.solve_cg(
                matvec, b, ridge=ridge, maxiter=s["steps"], tol=0.0, atol=0.0
            )

        def optimality(y: Variables, x: Variables) -> Variables:
            return lower_gradient(p)(x, y, data)

        @jaxopt.implicit_diff.custom_root(optimality, solve=solve)
        def answer(start: Variables, x: Variables) -> Variables:
            return start

        return p.upper_loss(answer(y, x), data)

    return jax.grad(value)


def _given(inputs: Any) -> tuple[Variables, None]:
    """The solver that has nothing left to solve, for `ImplicitAdjoint`: a root, and nothing beside."""
    return inputs[1], None


# In single precision lineax takes p'Ap for zero where it is less than 100 n eps r'r, so that a system
# of n = 270,000 unknowns counts as singular. In larger units the steps are the same, and it does not.
UNITS = 1024.0


def _optimality(root: Variables, _: None, inputs: Any) -> Variables:
    """What is zero at the root; the damping is a proximal term with its centre at y."""
    x, y, data, lower_loss, damping, *_ = inputs
    gradient = jax.grad(lower_loss, argnums=1)(x, root, data)
    return tree_map(lambda g, r, y: UNITS * (g + damping * (r - y)), gradient, root, y)


def by_optimistix_implicit(p: Problem, s: Settings) -> Hypergradient:
    """`ImplicitAdjoint` with lineax's conjugate gradients, which take one more product to start."""
    cg = lx.CG(rtol=0.0, atol=0.0, stabilise_every=None, max_steps=s["steps"])
    adjoint = optx.ImplicitAdjoint(cg)
    tags = frozenset([lx.positive_semidefinite_tag])

    def value(x: Variables, y: Variables, data: Any) -> jax.Array:
        inputs = (x, y, data, p.lower_loss, s["damping"])
        root, _ = adjoint.apply(_given, _optimality, inputs, tags)
        return p.upper_loss(root, data)

    return jax.grad(value)


# Turns of the loop that are written out at once, the fastest of 1, 4 and all.
WRITTEN_OUT = {"small": 4, "middle": 1, "logistic": 20}

CASES: dict[str, dict[str, Callable[[Problem, Settings], Hypergradient]]] = {
    "unrolled": {
        "JAX, scan": by_scan,
        "JAX, scan, recomputing": lambda p, s: by_scan(p, s, remat=True),
        "JAX, adjoint by hand": lambda p, s: by_mixed_scans(p, s, WRITTEN_OUT[s["problem"]]),
        "jaxopt, OptaxSolver": by_jaxopt_unrolled,
        "optimistix, OptaxMinimiser": by_optimistix_unrolled,
    },
    "implicit": {
        "JAX, linearize": lambda p, s: by_products(p, s, linearize=True),
        "JAX, jvp": lambda p, s: by_products(p, s, linearize=False),
        "jaxopt, custom_root": by_jaxopt_implicit,
        "optimistix, ImplicitAdjoint": by_optimistix_implicit,
    },
}


def build(arrays: Mapping[str, np.ndarray], settings: Settings) -> dict[str, Run]:
    """The competitors of one problem and one kind of hypergradient."""
    p = problem(settings["problem"], arrays)

    def made(make: Callable[[Problem, Settings], Hypergradient]) -> Run:
        compiled = jax.jit(make(p, settings))
        return lambda: jax.block_until_ready(compiled(p.upper, p.lower, p.data))

    return {name: made(make) for name, make in CASES[settings["kind"]].items()}


def main() -> None:
    libraries = ("jax", "jaxlib", "jaxopt", "optimistix", "lineax", "equinox", "optax")
    serve(build, {name: version(name) for name in libraries})


if __name__ == "__main__":
    main()
