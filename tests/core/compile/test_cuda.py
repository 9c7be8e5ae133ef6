"""What only a GPU shows: recorded steps, and a loop that never waits."""

import gc
import warnings
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import (
    Batches,
    Compiled,
    ConjugateGradient,
    Implicit,
    Problem,
    Step,
    Unrolled,
    train,
)
from bilevel.compile.cuda_graph import CudaGraph, Pool
from bilevel.methods import BiDVL

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
HOWS = ["record", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _no_fallback() -> Any:
    """A step that runs as without `compile` would pass every comparison."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*as without `compile`")
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        yield


def steps(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[BiDVL, Any]:
    """A small BiDVL on the GPU, on bytes that stay there."""
    model = BiDVL.for_images((3, 8, 8), latent_dim=3, width=8).cuda().to(dtype).train()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    upper = torch.optim.Adam(model.upper.parameters(), 1e-3, (0.0, 0.9), fused=True)
    lower = torch.optim.Adam(model.lower.parameters(), 1e-3, (0.0, 0.9), fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(upper, 0.5)
    taken = train(
        model,
        Batches(images.cuda(), 10, seed=0, convert=lambda rows: model.as_visibles(rows).to(dtype)),
        upper_optimizer=upper,
        lower_optimizer=lower,
        upper_scheduler=schedule,
        num_steps=10,
        order="upper_first",
        check_every=10**9,
        **options,
    )
    return model, taken


@pytest.mark.parametrize("options", [{"dtype": torch.float64}, {"precision": torch.bfloat16}])
@pytest.mark.parametrize("how", HOWS)
@on_gpu
def test_a_run_of_graphs_equals_the_eager_one(device: str, how: Any, options: Any) -> None:
    eager, taken = steps(**options)
    list(islice(taken, 5))
    recorded, taken = steps(compile=how, **options)
    last: Step = list(islice(taken, 5))[-1]
    # Adam divides by sqrt(v) + 1e-8: what rounding leaves of a gradient that is 0, 1e-9 in float32,
    # moves a weight by a tenth of the rate; in float64 it moves nothing
    exact = options.get("dtype") is torch.float64
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if exact else {"rtol": 5e-2, "atol": 5e-3}
    theirs = dict(eager.named_parameters())
    for name, parameter in recorded.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], **tolerance, msg=name)
    assert last.upper_loss.device.type == device


@pytest.mark.parametrize("how", [False, *HOWS])
@on_gpu
def test_the_loop_never_waits_for_the_device(device: str, how: Any) -> None:
    _, taken = steps(compile=how)
    next(taken)  # rehearsal, recording or compilation
    next(taken)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            next(taken)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Regression(Problem):
    """A small ridge regression with a learned penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"penalty": torch.zeros(3)})
        self.lower = nn.Linear(3, 1)
        self.double().cuda()
        for p in self.lower.parameters():
            nn.init.constant_(p, 0.5)

    def lower_loss(self, batch: Tensor) -> Tensor:
        penalty = (self.upper["penalty"].exp() * self.lower.weight.square()).mean()
        return (self.lower(batch)[:, 0] - batch.sum(1)).square().mean() + penalty

    def upper_loss(self, batch: Tensor) -> Tensor:
        return (self.lower(batch)[:, 0] - batch.sum(1)).square().mean()


def regression(**options: Any) -> list[Tensor]:
    """The variables after a run in float64, one learning rate of which falls in every step."""
    problem = Regression()
    rows = torch.randn(40, 3, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    make: Any = options.pop("make")
    lower = make(problem.lower.parameters(), 1e-2)
    for _ in train(
        problem,
        rows.cuda(),
        batch_size=10,
        num_steps=6,
        lower_steps=2,
        upper_optimizer=make(problem.upper.parameters(), 1e-1),
        lower_optimizer=lower,
        lower_scheduler=torch.optim.lr_scheduler.ExponentialLR(lower, 0.5),
        **options,
    ):
        pass
    return [p.detach() for p in problem.parameters()]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    "solver", [None, Unrolled(num_steps=2), Implicit(ConjugateGradient(max_steps=4, damping=1.0))]
)
@on_gpu
def test_recorded_optimizers_and_units_in_float64(device: str, make: Any, solver: Any) -> None:
    eager = regression(make=make, solver=solver, throw=False)
    recorded = regression(make=make, solver=solver, throw=False, compile=True)
    torch.testing.assert_close(recorded, eager, rtol=1e-10, atol=1e-12)


@on_gpu
def test_a_recorded_hypergradient_outside_the_loop(device: str) -> None:
    problem = Regression()
    rows = torch.randn(10, 3, dtype=torch.double, device=device)
    solver = Implicit(ConjugateGradient(max_steps=4, damping=1.0))
    found = [
        s.hypergradient(problem, rows, [rows]).grad for s in (solver, Compiled(solver, "record"))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@on_gpu
def test_graphs_share_memory_and_their_answers_do_not(device: str) -> None:
    pool = Pool(torch.device(device, torch.cuda.current_device()))

    def doubled(x: Tensor) -> list[Tensor]:
        return [(x * 2).sum(), x * 2]

    def squared(x: Tensor) -> list[Tensor]:
        return [(x * x).sum(), x * x]

    x = torch.arange(2**20, device=device, dtype=torch.double)
    graphs = [CudaGraph(run, [x], [], pool=pool) for run in (doubled, squared)]
    answers = [graph(x + 1) for graph in graphs]
    for graph in reversed(graphs):
        graph(x - 1)
    for run, answer in zip((doubled, squared), answers, strict=True):
        torch.testing.assert_close(answer, run(x + 1))
    del graphs, graph  # the pool outlives its graphs
    gc.collect()
    torch.testing.assert_close(CudaGraph(doubled, [x], [], pool=pool)(x), doubled(x))


@on_gpu
def test_a_failed_capture_leaves_the_stream_and_the_next_one_alone(device: str) -> None:
    x = torch.ones(4, device=device)
    pool = Pool(torch.device(device, torch.cuda.current_device()))
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        CudaGraph(lambda x: [x * float(x.sum())], [x], [], pool=pool)
    calls: list[int] = []

    def late(x: Tensor) -> list[Tensor]:  # in the capture itself, after three calls
        calls.append(1)
        return [x * float(x.sum())] if len(calls) > 3 else [x]

    with pytest.raises(RuntimeError):
        CudaGraph(late, [x], [], pool=pool)
    assert torch.cuda.current_stream() == stream
    torch.testing.assert_close(CudaGraph(lambda x: [x + 1], [x], [])(x), [x + 1])


def test_a_tensor_elsewhere_is_not_recorded() -> None:
    with pytest.raises(ValueError, match="2 tensors of the step are not on the CUDA device"):
        CudaGraph(lambda a, b: [a + b], [torch.zeros(1)], [torch.zeros(1)])
