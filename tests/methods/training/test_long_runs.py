"""Long runs: evaluation on the side, bounded checkpoints, moving averages, what a step will cost."""

import copy
import inspect
import json
import os
import time
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bilevel import Alternating, CheckpointError, ConjugateGradient, Implicit
from bilevel.checkpoint import read_checkpoint
from bilevel.cli import progress as progress_module
from bilevel.cli.dry_run import dry_run
from bilevel.cli.options import UsageError
from bilevel.cli.progress import Progress
from bilevel.cli.running import LOOK, Plan, carry_out
from bilevel.methods import EBLVM, RBM, AdvIL, BiDVL, History, Training
from bilevel.methods.data.images import Images
from bilevel.methods.evaluation.evaluate import evaluate
from bilevel.methods.evaluation.features import FeatureNetwork
from bilevel.methods.training.best import rule_of
from bilevel.methods.training.fit import begin, fit
from bilevel.methods.training.footprint import Footprint, advice, asked, footprint, largest_batch
from bilevel.methods.training.run import Run
from bilevel.methods.training.settings import validated

SHAPE = (1, 8, 8)
SHORT = {"num_steps": 6, "batch_size": 10, "log_every": 1, "checkpoint_every": 2}


def made(**options: Any) -> BiDVL:
    return BiDVL.for_images(SHAPE, latent_dim=2, width=4, **options)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_variance = nn.Linear(64, 2), nn.Linear(64, 2)

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(v.flatten(1)), self.log_variance(v.flatten(1))


def parts() -> dict[str, nn.Module]:
    """Networks of few operations, for tests that take many steps."""
    torch.manual_seed(0)
    energy = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 1))
    generator = nn.Sequential(nn.Linear(2, 64), nn.BatchNorm1d(64), nn.Unflatten(1, SHAPE))
    return {"energy": energy, "posterior": Heads(), "generator": generator}


def small(**options: Any) -> BiDVL:
    return BiDVL(**parts(), latent_dim=2, visible_shape=SHAPE, **options)


def data(rows: int = 30) -> Tensor:
    return torch.rand(rows, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def trained(
    model: EBLVM,
    run: Path | None = None,
    *,
    evaluate: Callable[[EBLVM], dict[str, float]] | None = None,
    resume: bool = False,
    callbacks: Any = (),
    **settings: Any,
) -> History:
    return fit(
        model,
        data(),
        validated(Training, {**SHORT, **settings}),
        solver=None,
        callbacks=callbacks,
        run=run,
        resume=resume,
        overwrite=False,
        optimizers=None,
        evaluate=evaluate,
    )


def told(values: dict[str, list[float]]) -> Callable[[EBLVM], dict[str, float]]:
    """An evaluation that gives these numbers, one after the other."""
    series = iter(
        [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    )
    return lambda model: next(series)


def falling(model: EBLVM) -> dict[str, float]:
    """A number that falls with every step of `small`."""
    passes = model.get_buffer("lower.generator.1.num_batches_tracked")
    return {"frechet": 100.0 - float(passes)}


def by_weights(model: EBLVM) -> dict[str, float]:
    """A number that depends on the weights alone."""
    return {"frechet": sum(p.detach().double().square().sum().item() for p in model.parameters())}


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in r.items() if name != "seconds"} for r in records]


# ---------------------------------------------------------------------- evaluation on the side


def rude(model: EBLVM) -> dict[str, float]:
    """Everything an evaluation must not be able to spoil."""
    torch.manual_seed(torch.randint(1000, ()).item())
    model.statistics = "batch"
    model.sample(5)
    model.reconstruct(data(4))
    model.train()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(2)
    return {"frechet": 1.0}


def test_a_run_with_evaluations_equals_one_without_to_the_bit():
    without, evaluated = made(), made()
    torch.manual_seed(5)
    plain = trained(without)
    after = torch.rand(3)
    torch.manual_seed(5)
    history = trained(evaluated, evaluate=rude, evaluate_every=2)
    assert torch.equal(torch.rand(3), after)
    assert_equal(without, evaluated)
    assert timeless(plain.records) == timeless(history.records)
    assert [record["step"] for record in history.evaluations] == [2, 4, 6]


def test_the_clock_stands_still_during_an_evaluation():
    def slow(model: EBLVM) -> dict[str, float]:
        time.sleep(0.2)
        return {}

    began = time.perf_counter()
    history = trained(made(), evaluate=slow, evaluate_every=2)
    assert history.seconds <= time.perf_counter() - began - 0.6


def test_evaluations_are_written_with_their_step(tmp_path):
    numbers = {"rmse": [0.5, 0.4, 0.3], "auroc": [0.1, 0.2, 0.3]}
    history = trained(made(), tmp_path, evaluate=told(numbers), evaluate_every=2)
    assert Run(tmp_path).evaluations() == history.evaluations
    assert timeless(history.evaluations)[1] == {"step": 4, "rmse": 0.4, "auroc": 0.2}


def test_an_evaluation_needs_a_rhythm_and_a_rhythm_an_evaluation():
    with pytest.raises(ValueError, match="`evaluate_every` is given, but not `evaluate`"):
        trained(made(), evaluate_every=2)
    with pytest.raises(ValueError, match="`evaluate` is given, but not `evaluate_every`"):
        trained(made(), evaluate=rude)


def test_a_failing_evaluation_names_its_step(tmp_path):
    def fails(model: EBLVM) -> dict[str, float]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        trained(made(), tmp_path, evaluate=fails, evaluate_every=3)
    assert caught.value.__notes__ == ["in the evaluation after step 3"]
    assert read_checkpoint(tmp_path / "checkpoints" / "last.pt")["step"] == 2


# ---------------------------------------------------------------------- the best model


def test_the_model_with_the_lowest_distance_is_kept(tmp_path):
    snapshots = {}

    def keep(step: Any) -> None:
        snapshots[step.number] = copy.deepcopy(step.state.problem)

    numbers = {"frechet": [3.0, 1.0, 2.0], "rmse": [0.3, 0.2, 0.1]}
    trained(made(), tmp_path, evaluate=told(numbers), evaluate_every=2, callbacks=[keep])
    assert_equal(BiDVL.load(tmp_path / "best"), snapshots[4])
    said = json.loads((tmp_path / "best" / "best.json").read_text())
    assert said["step"] == said["evaluation"]["step"] == 4
    assert said["evaluation"]["frechet"] == 1.0
    assert "lowest `frechet`" in said["rule"]


@pytest.mark.parametrize(
    ("numbers", "step"),
    [
        ({"rmse": [0.3, 0.2, 0.25]}, 4),
        ({"frechet": [float("nan"), 2.0, 1.0]}, 6),
        ({"frechet": [2.0, 2.0, 2.0]}, 2),
        ({"auroc": [0.3, 0.5, 0.25]}, 4),
        ({"temperature": [0.3, 0.2, 0.25]}, None),
    ],
    ids=["by rmse", "not a number", "the first of equal ones", "the highest", "nothing to go by"],
)
def test_the_rule_of_the_best_model(numbers, step):
    best: dict[str, Any] | None = None
    names, rows = list(numbers), zip(*numbers.values(), strict=True)
    for number, row in zip([2, 4, 6], rows, strict=True):
        found = {"step": number, **dict(zip(names, row, strict=True))}
        rule = rule_of(None, found)
        best = found if rule is not None and rule.better(found, best) else best
    assert (best and best["step"]) == step


def test_no_model_that_is_not_finite_is_evaluated(tmp_path):
    def poison(step: Any) -> None:
        if step.number == 6:
            with torch.no_grad():
                next(step.state.problem.parameters()).fill_(float("nan"))

    settings = {"evaluate": by_weights, "evaluate_every": 3, "callbacks": [poison]}
    with pytest.raises(CheckpointError, match="NaN or infinite numbers after step 6"):
        trained(made(), tmp_path, **settings)
    assert [record["step"] for record in Run(tmp_path).evaluations()] == [3]


# ---------------------------------------------------------------------- checkpoints


def steps_on_disk(folder: Path) -> dict[str, int]:
    files = sorted((folder / "checkpoints").iterdir())
    return {file.name: read_checkpoint(file)["step"] for file in files}


def test_as_many_checkpoints_are_kept_as_asked(tmp_path):
    settings = {"num_steps": 7, "checkpoint_every": 1, "keep_checkpoints": 3}
    trained(made(), tmp_path, **settings, callbacks=[lambda step: step.number == 5])
    kept = {"last.pt": 5, "step-00000003.pt": 3, "step-00000004.pt": 4}
    assert steps_on_disk(tmp_path) == kept
    trained(made(), tmp_path, **settings, resume=True)
    kept = {"last.pt": 7, "step-00000005.pt": 5, "step-00000006.pt": 6}
    assert steps_on_disk(tmp_path) == kept


def test_one_checkpoint_is_kept_if_nothing_is_asked(tmp_path):
    trained(made(), tmp_path, checkpoint_every=1)
    assert steps_on_disk(tmp_path) == {"last.pt": 6}


def test_checkpoints_are_kept_where_files_have_one_name_only(tmp_path, monkeypatch):
    def no_links(*_: Any) -> None:
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "link", no_links)
    trained(made(), tmp_path, keep_checkpoints=2)
    assert steps_on_disk(tmp_path) == {"last.pt": 6, "step-00000004.pt": 4}


class Killed(BaseException):
    """What a process that is killed does not live to see."""


def killed_before(call: int, monkeypatch: pytest.MonkeyPatch, start: Callable[[], object]) -> bool:
    """Whether the process died before it renamed or linked a file for the `call`-th time."""
    count = 0

    def mortal(function: Callable[..., None]) -> Callable[..., None]:
        def dies(*arguments: Any, **more: Any) -> None:
            nonlocal count
            count += 1
            if count == call:
                raise Killed
            function(*arguments, **more)

        return dies

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", mortal(os.replace))
        patched.setattr(os, "link", mortal(os.link))
        try:
            start()
        except Killed:
            return True
    return False


def test_a_run_killed_at_any_write_resumes_to_the_same_end(tmp_path, monkeypatch):
    settings = {
        "num_steps": 2,
        "checkpoint_every": 1,
        "keep_checkpoints": 2,
        "evaluate": falling,
        "evaluate_every": 1,
        "upper_lr": 1e-2,
        "lower_lr": 1e-2,
    }
    whole, reference = small(), Run(tmp_path / "whole")
    trained(whole, reference.folder, **settings)
    assert (reference.best() or {})["step"] == 2  # the best model is replaced once
    calls, resumed = 0, 0
    while True:
        calls += 1
        run = Run(tmp_path / f"killed-{calls}")
        if not killed_before(
            calls, monkeypatch, lambda run=run: trained(small(), run.folder, **settings)
        ):
            break
        if not run.checkpoint_path.exists():
            continue  # nothing was promised yet
        resumed += 1
        best = run.best()
        if best is not None:
            assert falling(BiDVL.load(run.best_path, **parts()))["frechet"] == best["frechet"]
        again = small()
        trained(again, run.folder, resume=True, **settings)
        assert_equal(again, whole)
        assert timeless(run.metrics()) == timeless(reference.metrics())
        assert timeless(run.evaluations()) == timeless(reference.evaluations())
        assert timeless([run.best()]) == timeless([reference.best()])
        assert_equal(
            BiDVL.load(run.best_path, **parts()), BiDVL.load(reference.best_path, **parts())
        )
        assert steps_on_disk(run.folder) == {"last.pt": 2, "step-00000001.pt": 1}
    assert resumed >= 8


def test_a_new_run_in_an_old_folder_starts_empty(tmp_path):
    settings = {"evaluate": by_weights, "evaluate_every": 2, "keep_checkpoints": 3}
    trained(made(), tmp_path, **settings)
    Run(tmp_path).begin({})
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"config.json", "model.json", "weights.safetensors"}
    assert Run(tmp_path).best() is None


# ---------------------------------------------------------------------- moving averages


def averages(settings: dict[str, Any], decay: float) -> tuple[EBLVM, dict[str, Tensor]]:
    """The model after training, and the average computed by hand."""
    model = made()
    mean = {name: p.detach().clone() for name, p in model.named_parameters()}

    def follow(step: Any) -> None:
        for name, p in step.state.problem.named_parameters():
            mean[name] = decay * mean[name] + (1 - decay) * p.detach()

    trained(model, **settings, ema=decay, callbacks=[follow])
    return model, mean


def test_the_trained_model_is_the_moving_average():
    model, mean = averages({"upper_lr": 1e-2, "lower_lr": 1e-2}, 0.8)
    assert not model.training
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), mean[name], rtol=1e-5, atol=1e-7)


def test_evaluations_see_the_moving_average(tmp_path):
    model = made()
    history = trained(model, tmp_path, evaluate=by_weights, evaluate_every=6, ema=0.8)
    assert history.evaluations[-1]["frechet"] == by_weights(model)["frechet"]


def test_a_resumed_average_equals_the_uninterrupted_one(tmp_path):
    whole, first, again, once_more = made(), made(), made(), made()
    trained(whole, ema=0.8)
    trained(first, tmp_path, ema=0.8, callbacks=[lambda step: step.number == 4])
    raw = read_checkpoint(tmp_path / "checkpoints" / "last.pt")["problem"]
    mean = first.state_dict()  # the checkpoint goes on from other weights
    assert any(not torch.equal(raw[name], mean[name]) for name in mean)
    trained(again, tmp_path, ema=0.8, resume=True)
    assert_equal(again, whole)
    trained(once_more, tmp_path, ema=0.8, resume=True)  # there is nothing left to train
    assert_equal(once_more, whole)
    assert_equal(BiDVL.load(tmp_path / "model"), whole)


# ---------------------------------------------------------------------- what a step costs


def products(model: BiDVL, network: str, v: Tensor) -> int:
    """Multiplications of one forward pass for one image, from the layers' shapes."""
    count = 0

    def add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal count
        transposed = isinstance(layer, nn.ConvTranspose2d)
        pixels = (inputs[0] if transposed else output)[0, 0].numel()
        count += layer.weight.numel() * pixels

    module = model.network(network)
    convolutions = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    hooks = [m.register_forward_hook(add) for m in convolutions]
    module.eval()(v)
    for hook in hooks:
        hook.remove()
    return count


def test_the_published_networks_need_the_operations_of_the_fact_sheet():
    model = BiDVL.for_images((3, 32, 32))
    image, latent = torch.zeros(1, 3, 32, 32), torch.zeros(1, 100)
    energy = products(model, "energy", image)
    posterior = products(model, "posterior", image)
    generator = products(model, "generator", latent)
    # A pass forward costs the products once, back to the weights once, back to the input once.
    # The official code: energy of v and v^ in the upper level (3 + 3), for the ratio (1), of v^ in the
    # lower one (3); posterior of v (3), of v^ without its weights (2); generator of h^ (1 + 3), h (3).
    official = 10 * energy + 5 * posterior + 7 * generator
    assert official / 1e9 == pytest.approx(2.8, abs=0.05)
    # Here: no ratio that nobody reads, no energy weights in the lower level; v^ once if it is shared.
    ours = 8 * energy + 5 * posterior + (6 if model.shares else 7) * generator
    counted = footprint(model, 8).operations / (2 * 8)
    assert counted == pytest.approx(ours, rel=0.01)  # the gradient with respect to v is not taken


@cache
def cost(batch_size: int) -> Footprint:
    """That of networks small enough to be measured too."""
    return footprint(BiDVL.for_images((1, 16, 16), width=16), batch_size)


def test_cost_grows_with_the_batch_as_operations_and_activations_do():
    one, two = cost(40), cost(80)
    assert two.operations == 2 * one.operations
    assert two.activations == pytest.approx(2 * one.activations, rel=0.05)
    assert (two.weights, two.optimizer, two.gradients) == (
        one.weights,
        one.optimizer,
        one.gradients,
    )


def test_weights_are_those_of_the_networks():
    model = BiDVL.for_images((1, 16, 16), width=16)
    assert cost(40).weights == sum(t.nbytes for t in model.state_dict().values())
    assert cost(40).parameters == {
        name: sum(p.numel() for p in model.network(name).parameters())
        for name in ("energy", "posterior", "generator")
    }


class Again:
    """A source of one batch."""

    def __next__(self) -> Tensor:
        return torch.zeros(40, 1, 16, 16)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_memory_is_what_the_profiler_measures():
    model, training = BiDVL.for_images((1, 16, 16), width=16), Training(num_steps=3)
    optimizers = model.optimizers(training)
    steps = begin(model, Again(), training, Alternating(), optimizers, check_every=1)
    next(steps)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        next(steps)
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert cost(40).gradients + cost(40).activations == pytest.approx(peak, rel=0.1)


def test_counting_leaves_the_model_as_it_is():
    model = made()
    before, state = copy.deepcopy(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    counted = footprint(model, 4, training=Training(ema=0.9))
    assert counted.weights == 2 * sum(t.nbytes for t in model.state_dict().values())
    assert_equal(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_a_solver_that_looks_at_numbers_can_be_counted():
    model, solver = small(variant="complete"), Implicit(ConjugateGradient(max_steps=1))
    assert footprint(model, 8).operations < footprint(model, 8, solver=solver).operations


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes at least 10 kB and a visible 100 bytes: counting takes seconds."""

    def stand_in(model: EBLVM, batch_size: int, **_: Any) -> Footprint:
        parts = {"energy": 1709, "generator": 847}
        activations = max(6000, 100 * batch_size)
        return Footprint(
            batch_size,
            parameters=parts,
            operations=5 * 10**8,
            weights=1000,
            optimizer=2000,
            gradients=1000,
            activations=activations,
        )

    for module in ("methods.footprint", "cli.dry_run"):
        monkeypatch.setattr(f"bilevel.{module}.footprint", stand_in)


@pytest.mark.parametrize(
    ("room", "size"), [(24_000, 200), (24_099, 200), (23_999, 199), (10_000, 60), (9_999, 0)]
)
def test_the_largest_batch_where_activations_do_not_decide(line, room, size):
    assert largest_batch(made(), room) == pytest.approx(size, abs=0 if size > 60 or not size else 6)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="`batch_size` must be positive"):
        footprint(made(), 0)
    model = made()
    model.visible_shape = None
    with pytest.raises(ValueError, match="say which one by `shape="):
        footprint(model, 4)


# ---------------------------------------------------------------------- out of memory


def greedy(model: EBLVM, step: int) -> EBLVM:
    """A model that asks for a petabyte when it draws the noise of a step."""
    calls, draw = iter(range(1000)), model.draw

    def drawn(rows: Tensor, generator: torch.Generator) -> Any:
        if next(calls) == step:
            torch.empty(2**50, dtype=torch.uint8)
        return draw(rows, generator)

    model.draw = drawn  # type: ignore[method-assign]
    return model


def test_running_out_of_memory_says_what_was_asked(line, monkeypatch):
    monkeypatch.setattr("bilevel.methods.training.footprint.available", lambda device: 10**12)
    with pytest.raises(MemoryError) as caught:
        trained(greedy(made(), step=2))
    message = str(caught.value)
    assert message.startswith("out of memory at `batch_size` 10: 1125899.9 GB more were asked for")
    assert "this process can have 1000.0 GB in all" in message
    assert message.endswith("something else holds the memory: free it, or halve the batch")


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (10**4, "not even a batch of 2 would fit"),
        (24_000 / 0.9 + 10, "A step is estimated to need 0.1 MB; set `batch_size` to 200 or less"),
        (10**9, "something else holds the memory"),
        (None, "make `batch_size` smaller"),
    ],
)
def test_advice_fits_what_there_is(line, there, words, monkeypatch):
    monkeypatch.setattr(
        "bilevel.methods.training.footprint.available",
        lambda device: None if there is None else int(there),
    )
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")
    text = advice(error, made(), Training(batch_size=1000), Alternating(), SHAPE)
    assert "21 MB more were asked for" in text
    assert text.endswith(words) or words in text


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    assert asked(RuntimeError("shapes do not match")) is None

    def draw(rows: Tensor, generator: torch.Generator) -> Any:
        raise RuntimeError("no matter of memory")

    model = made()
    model.draw = draw  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no matter of memory"):
        trained(model)


# ---------------------------------------------------------------------- the command line


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def step(number: int, seconds: float) -> Any:
    return types.SimpleNamespace(
        number=number,
        seconds=seconds,
        upper_loss=torch.tensor(-1.5),
        lower_loss=torch.tensor(2.0),
        logs={},
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made_up = Clock()
    monkeypatch.setattr(progress_module.time, "monotonic", made_up.monotonic)
    return made_up


def test_a_day_of_training_is_some_lines_an_hour(clock, capsys):
    training = Training(num_steps=30_000, evaluate_every=3_000)
    times: list[float] = []
    seconds = 0.0
    with Progress(training) as progress:
        for number in range(1, 30_001):
            taken = 60.0 if number == 1 else 1.0  # the first one compiles
            seconds, clock.now = seconds + taken, clock.now + taken
            progress(step(number, seconds))
            times += [clock.now] * capsys.readouterr().out.count("\n")
            if number % 3_000 == 0:
                clock.now += 300.0
                progress.evaluated({"frechet": 31.25, "rmse": 0.17}, 300.0)
    hours = [sum(3600 * h <= t < 3600 * (h + 1) for t in times) for h in range(9)]
    assert max(hours) <= 42
    assert min(hours[:8]) >= 25


def test_the_time_left_counts_evaluations_and_not_the_first_step(clock, capsys):
    training = Training(num_steps=1000, evaluate_every=100)
    with Progress(training) as progress:
        progress(step(1, 500.0))
        clock.now = 600.0
        progress.evaluated({"frechet": 31.25}, 50.0)
        progress(step(501, 1000.0))  # 499 steps of a second, and five evaluations of 50 s
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("step    501/1000  [frechet 31.2 at 1]  upper -1.50  lower 2.00")
    assert line.endswith("16 min 40 s spent, 12 min 29 s left, 1 steps/s")


def test_the_time_left_of_a_resumed_run_is_that_of_its_own_steps(clock, capsys):
    # metrics tell of 900 steps, but the newest checkpoint is of step 500
    with Progress(Training(num_steps=1000), first=900) as progress:
        progress(step(501, 9.0))
        clock.now = 100.0
        progress(step(601, 109.0))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith("1 min 49 s spent, 6 min 39 s left, 1 steps/s")


def test_the_time_left_stops_at_the_time_limit(clock, capsys):
    with Progress(Training(num_steps=1000, max_seconds=150)) as progress:
        progress(step(1, 1.0))
        clock.now = 100.0
        progress(step(101, 101.0))
    assert "49 s left" in capsys.readouterr().out


def plan(folder: Path, **settings: Any) -> Plan:
    images = Images("noise", "noise.npz", data(100), data(70), None, None, "made up")
    model = BiDVL.for_images(images.shape, latent_dim=2, width=4)
    features = FeatureNetwork("pixels", nn.Flatten(), dim=64)
    every = {**SHORT, **settings}
    return Plan(model, images, Run(folder), every, Alternating(), features=features)


def test_the_command_line_evaluates_and_keeps_the_best(tmp_path, capsys, monkeypatch):
    planned = plan(tmp_path / "r", evaluate_every=3)

    def look(model: EBLVM, *arguments: Any, **options: Any) -> dict[str, float]:
        assert model is not planned.model
        given = inspect.signature(evaluate).bind(model, *arguments, **options).arguments
        assert (given["features"], given["samples"]) == (planned.features, LOOK)
        return by_weights(model)

    monkeypatch.setattr("bilevel.cli.running.evaluate", look)
    assert carry_out(planned, report=False) == 0
    run = Run(tmp_path / "r")
    assert [record["step"] for record in run.evaluations()] == [3, 6]
    assert BiDVL.load(run.best_path).sample(2).shape == (2, *SHAPE)
    assert "pixels, 64 features" in run.config()["notes"]["evaluations"]["features"]
    assert "[frechet " in capsys.readouterr().out


def test_the_command_line_gives_the_advice(line, tmp_path):
    wanting = plan(tmp_path / "r")
    greedy(wanting.model, step=1)
    with pytest.raises(UsageError, match="out of memory at `batch_size` 10"):
        carry_out(wanting, report=False)


def test_a_dry_run_tells_the_cost_and_writes_nothing(line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bilevel.cli.dry_run.available", lambda device: 2 * 10**4)
    planned = plan(tmp_path / "r", num_steps=300_000, batch_size=100)
    before = copy.deepcopy(planned.model)
    assert dry_run(planned) == 0
    out = capsys.readouterr().out
    for words in (
        "BiDVL, Alternating()",
        "num_steps 300000",
        "noise: 100 of 1x8x8",
        "1,709  energy",
        "5e+08 a step, 1.5e+14 the whole run",
        "0.014 MB  at the worst moment",
        "too little; a `--batch-size` of",
        "2 s  at 100 TFLOP/s",
        "nothing was written",
    ):
        assert words in out
    assert not list(tmp_path.iterdir())
    assert_equal(planned.model, before)
    with pytest.raises(ValueError, match="only 100 visibles"):
        dry_run(plan(tmp_path, batch_size=101))


# ---------------------------------------------------------------------- resuming with other settings


def tiny() -> EBLVM:
    torch.manual_seed(0)
    return AdvIL(RBM(6, 3))


ROWS = (torch.rand(20, 6, generator=torch.Generator().manual_seed(0)) < 0.5).float()
BEGUN = {"num_steps": 3, "batch_size": 5, "upper_lr": 0.02, "log_every": 1, "checkpoint_every": 1}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"upper_lr": 0.5}, r"`upper_lr` was 0\.02, is 0\.5; leave them out to resume it"),
        ({"batch_size": 10, "seed": 3}, "`batch_size` was 5, is 10; `seed` was 0, is 3"),
        ({"lower_steps": 2}, "`lower_steps` was 5, is 2"),
        ({"ema": 0.9}, "`ema` was None, is 0.9"),
        ({"schedule": "cosine"}, "`schedule` was 'exponential', is 'cosine'"),
    ],
)
def test_settings_that_a_resumed_run_would_ignore_are_refused(changes, match, tmp_path):
    """Three rates gave equal energies: the checkpoint's rate was taken, without a word."""
    tiny().fit(ROWS, run=tmp_path, **BEGUN)
    before = Run(tmp_path).config()
    with pytest.raises(CheckpointError, match=match):
        tiny().fit(ROWS, run=tmp_path, resume=True, **{**BEGUN, "num_steps": 6, **changes})
    assert Run(tmp_path).config() == before


def test_a_run_is_made_longer_and_keeps_its_settings(tmp_path):
    """What is left out is the run's own, not the default; a longer run is the same to the bit."""
    whole, again = tiny(), tiny()
    whole.fit(ROWS, **{**BEGUN, "num_steps": 5})
    assert tiny().fit(ROWS, run=tmp_path, **BEGUN).total == 3
    history = again.fit(ROWS, run=tmp_path, resume=True, num_steps=5, keep_checkpoints=2)
    assert_equal(again, whole)
    assert (history.steps, history.total) == (2, 5)
    assert [record["step"] for record in history.records] == [1, 2, 3, 4, 5]
    done = tiny().fit(ROWS, run=tmp_path, resume=True, num_steps=5)
    assert (done.steps, done.total) == (0, 5)
    with pytest.raises(
        ValueError, match="after 5 steps, but `num_steps`, the steps in total, is 3"
    ):
        tiny().fit(ROWS, run=tmp_path, resume=True, num_steps=3)
