"""What only a GPU shows: recorded steps, and a loop that never waits."""

from itertools import islice
from typing import Any

import pytest
import torch

from bilevel import Batches, Step, train
from bilevel.compile.cuda_graph import CudaGraph
from bilevel.methods import BiDVL

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


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
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_a_recorded_run_equals_the_eager_one(device: str, options: dict[str, Any]) -> None:
    eager, taken = steps(**options)
    list(islice(taken, 5))
    recorded, taken = steps(compile=True, **options)
    last: Step = list(islice(taken, 5))[-1]
    # Adam divides by sqrt(v) + 1e-8: what rounding leaves of a gradient that is 0, 1e-9 in float32,
    # moves a weight by a tenth of the rate; in float64 it moves nothing
    exact = options.get("dtype") is torch.float64
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if exact else {"rtol": 5e-2, "atol": 5e-3}
    theirs = dict(eager.named_parameters())
    for name, parameter in recorded.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], **tolerance, msg=name)
    assert last.upper_loss.device.type == device


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_the_loop_never_waits_for_the_device(device: str, compiled: bool) -> None:
    _, taken = steps(compile=compiled)
    next(taken)  # rehearsal, compilation
    next(taken)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            next(taken)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_tensor_elsewhere_is_not_recorded() -> None:
    with pytest.raises(ValueError, match="2 tensors of the step are not on the CUDA device"):
        CudaGraph(lambda a, b: [a + b], [torch.zeros(1)], [torch.zeros(1)])
