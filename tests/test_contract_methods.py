"""The contract: every method in every form. A new one adds rows to `method_rows` and no test code."""

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bilevel.methods
from bilevel.methods import DBM, EBLVM, RBM, GaussianDBM, GaussianRBM
from bilevel.methods.samplers import HamiltonianMonteCarlo
from tests.devices import DEVICES
from tests.method_rows import ROWS, Row, machine, rng

BATCH, ROWS_OF_DATA, STEPS = 4, 12, 3
METHODS = [
    kind
    for kind in (getattr(bilevel.methods, name) for name in bilevel.methods.__all__)
    if isinstance(kind, type) and issubclass(kind, EBLVM) and kind is not EBLVM
]
# What an evaluation may change: batch norm's averages, and the vectors of power iterations.
MOVED_BY_EVALUATIONS = re.compile(r"(running_mean|running_var|num_batches_tracked|\b_u|\b_v)$")


# A traced run takes a second or more: of forms that trace alike, one.
TRACED = (
    "bidvl of own modules",
    "general bidvl symmetric, gaussian rbm",
    "general bidvl of tables, symmetric",
    "advil, rbm",
    "bism, exact, gaussian rbm",
    "bism of own modules",
    "vages, gaussian rbm",
    "cd, dbm",
    "pcd, rbm",
    "maximum likelihood, rbm",
    "nce, rbm",
    "score matching, gaussian rbm",
    "score matching of an own module",
    "vae",
)


def over_rows(check: str, names: Iterable[str] = ROWS) -> Any:
    """A case for each row; those in which the row has a defect fail, as long as it has."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(
                name, marks=pytest.mark.xfail(reason=ROWS[name].defects[check], strict=True)
            )
            if check in ROWS[name].defects
            else name
            for name in names
        ],
    )


@pytest.fixture(autouse=True)
def the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions on CUDA otherwise add in whatever order is fastest, which no bit survives."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


each_device = pytest.mark.parametrize("device", DEVICES)


# ---------------------------------------------------------------------- what is compared


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers by name, those that are saved and those that are not."""
    held = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in held}


def leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def assert_same(found: Any, expected: Any) -> None:
    """To the bit."""
    assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def put_back(model: nn.Module, before: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(before[name])


@contextmanager
def untouched(device: str) -> Iterator[None]:
    """Torch's global generators are where they were."""
    before = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if device == "cuda" else None
    yield
    assert torch.equal(torch.get_rng_state(), before)
    if cuda is not None:
        assert torch.equal(torch.cuda.get_rng_state(), cuda)


def value(loss: Any) -> Tensor:
    found: Tensor = loss[0] if isinstance(loss, tuple) else loss
    return found


# ---------------------------------------------------------------------- a row's model and batches


def drawn(row: Row, model: EBLVM, seed: int = 1) -> dict[str, Any]:
    """The batches of one turn: of the upper level, of the first lower step, of a later one."""
    device = model.device
    generator = rng(seed, device)
    batch = model.draw(row.data(BATCH).to(device), generator)
    if not model.variables("lower"):
        with pytest.raises(NotImplementedError, match="has a single level"):
            model.lower_loss(batch)
        return {"upper": batch}
    first, later = (model.draw_lower(batch, generator, step) for step in (0, 1))
    return {"upper": batch, "lower": first, "later": later}


def variables(model: EBLVM) -> dict[str, nn.Parameter]:
    """Those of both levels, each once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def evaluate(model: EBLVM, which: str, batch: Any) -> Any:
    return model.upper_loss(batch) if which == "upper" else model.lower_loss(batch)


def trained(row: Row, device: str, **options: Any) -> EBLVM:
    """The model after a few steps of `fit`."""
    model, data = row.build(device), row.data(ROWS_OF_DATA).to(device)
    settings = {"num_steps": STEPS, "batch_size": BATCH, "seed": 3, "log_every": 1}
    if model.variables("lower"):
        settings["lower_steps"] = 2  # the first, and one of those that follow
    model.fit(data, **{**settings, **options})
    return model


@cache
def kept(name: str, device: str) -> EBLVM:
    """A trained model that several checks look at and none changes."""
    return trained(ROWS[name], device)


def made_of(row: Row) -> dict[str, Any]:
    """The modules that `load` needs."""
    return {} if row.modules is None else row.modules()


@cache
def heard(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the trained model said, and its losses."""
    return said_by(ROWS[name], kept(name, "cpu")), losses_of(ROWS[name], kept(name, "cpu"))


def answers(row: Row, model: EBLVM) -> dict[str, Callable[[Tensor], Tensor]]:
    """What a trained model says of visibles, by the method's name."""
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "energy": model.energy,
        "posterior": lambda v: numbers_of(model.posterior(v)),
        "reconstruct": model.reconstruct,
    }
    return {name: call for name, call in found.items() if name not in row.not_there}


def numbers_of(distribution: Any) -> Tensor:
    """A distribution over latents in numbers, shape (n, ...)."""
    mean: Tensor = distribution.mean
    return distribution.probs if mean.isnan().any() else mean


# ---------------------------------------------------------------------- the table itself


@cache
def kinds(name: str) -> tuple[type[EBLVM], set[type[nn.Module]]]:
    """The method of a row, and the modules it is made of."""
    model = ROWS[name].build()
    return type(model), {type(module) for module in model.modules()}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_row(method: Any) -> None:
    forms = [ROWS[name].build() for name in ROWS if kinds(name)[0] is method]
    assert forms, f"add rows of `{method.__name__}` to `tests/method_rows.py`"
    if hasattr(method, "for_images"):
        assert any(len(model.visible_shape or ()) == 3 for model in forms)
    if hasattr(method, "for_table"):
        assert any(len(model.visible_shape or ()) == 1 for model in forms)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_traced(method: Any) -> None:
    assert any(kinds(name)[0] is method for name in TRACED)


@pytest.mark.parametrize("kind", [RBM, GaussianRBM, DBM, GaussianDBM])
@pytest.mark.parametrize("method", METHODS)
def test_every_machine_that_a_method_takes_has_a_row(method: Any, kind: Any) -> None:
    try:
        getattr(method, "for_model", method)(machine(kind))
    except (TypeError, ValueError):
        return
    assert any(kinds(name)[0] is method and kind in kinds(name)[1] for name in ROWS)


# ---------------------------------------------------------------------- losses


@over_rows("made")
def test_a_model_is_made_the_same_each_time(name: str) -> None:
    with untouched("cpu"):
        one, other = ROWS[name].make(), ROWS[name].make()
    assert_same(tensors(other), tensors(one))
    assert not {id(p) for p in one.parameters()} & {id(p) for p in other.parameters()}


@each_device
@over_rows("functions")
def test_losses_are_functions(name: str, device: str) -> None:
    """Of variables and batch: twice the same to the bit, and nothing is changed on the way."""
    row = ROWS[name]
    model = row.build(device)
    for which, batch in drawn(row, model).items():
        before, given = tensors(model), copy.deepcopy(leaves(batch))
        with untouched(device):
            first = evaluate(model, which, batch)
        after = tensors(model)
        for tensor in before:
            if not MOVED_BY_EVALUATIONS.search(tensor):
                assert_same(after[tensor], before[tensor])
        assert_same(leaves(batch), given)
        put_back(model, before)
        second = evaluate(model, which, batch)
        assert_same(leaves(second), leaves(first))
        assert value(first).ndim == 0
        assert value(first).isfinite()
        assert value(first).dtype == torch.float64
        put_back(model, before)
        with torch.no_grad():
            assert_same(value(evaluate(model, which, batch)), value(first).detach())
        assert all(p.grad is None for p in model.parameters())


@each_device
@over_rows("reach")
def test_gradients_reach_every_variable(name: str, device: str) -> None:
    row = ROWS[name]
    model = row.build(device)
    batches = drawn(row, model)
    for level in [level for level in ("upper", "lower") if level in batches]:
        own: Any = model.variables(level)
        loss = value(evaluate(model, level, batches[level]))
        grads = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
        for variable, grad in zip(own, grads, strict=True):
            said = f"{level} variable {variable}"
            if any(level == at and part in variable for at, part in row.stands_still):
                assert grad is None or not grad.any(), said
                continue
            assert grad is not None, said
            assert grad.isfinite().all(), said
            assert grad.any(), said


@over_rows("slopes")
def test_gradients_are_the_slopes_of_the_losses(name: str) -> None:
    """Against differences of fourth order, in the variables of both levels."""
    row = ROWS[name]
    model = row.build().eval()  # power iterations rest
    away_from_kinks(model)
    batches, generator = drawn(row, model), rng(7)
    for level in [level for level in ("upper", "lower") if level in batches]:
        if level in row.bumpy:
            continue
        moved = list(variables(model).values())
        _, *grads = with_gradient(model, level, batches[level])
        loss = partial(evaluate, model, level, batches[level])
        for _ in range(2):
            along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in moved]
            slope = sum((g * d).sum() for g, d in zip(grads, along, strict=True))
            assert_close(difference(loss, moved, along), slope, rtol=1e-6, atol=1e-7)


def away_from_kinks(model: nn.Module) -> None:
    """Larger weights, and no bias of 0: units of published networks begin close to where they bend."""
    generator = rng(9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 4)


def difference(
    loss: Callable[[], Any], moved: list[nn.Parameter], along: list[Tensor], size: float = 1e-6
) -> Tensor:
    """The slope of a loss along a direction, from four values."""
    start = [p.detach().clone() for p in moved]

    def at(steps: int) -> Tensor:
        with torch.no_grad():
            for p, origin, d in zip(moved, start, along, strict=True):
                p.copy_(origin + steps * size * d)
        return value(loss()).detach()

    found = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * size)
    at(0)
    return found


# ---------------------------------------------------------------------- draws


@each_device
@over_rows("draws")
def test_batches_are_drawn_from_the_generator_alone(name: str, device: str) -> None:
    row = ROWS[name]
    with untouched(device):
        one, other, third = (leaves(drawn(row, row.build(device), seed)) for seed in (1, 1, 2))
    assert_same(one, other)
    if not row.draws_nothing:
        assert any(not torch.equal(a, b) for a, b in zip(one, third, strict=True))


@over_rows("draws")
def test_drawing_changes_no_variable_and_no_data(name: str) -> None:
    row = ROWS[name]
    model, data = row.build(), row.data(BATCH)
    given, before = data.clone(), {n: p.detach().clone() for n, p in model.named_parameters()}
    batch = model.draw(data, rng())
    if model.variables("lower"):
        model.draw_lower(batch, rng(), 0)
    assert_same(data, given)
    assert_same(dict(model.named_parameters()), before)


@over_rows("share")
def test_what_the_levels_share_changes_no_loss(name: str) -> None:
    row = ROWS[name]
    model = row.build().eval()
    away_from_kinks(model)
    batches = drawn(row, model)
    for level in [level for level in ("upper", "lower") if level in batches]:
        pair = [model.share(batches["upper"]), batches["upper"]]
        if level == "lower":
            pair = [model.draw_lower(batch, rng(5), 0) for batch in pair]
        found, expected = (with_gradient(model, level, batch) for batch in pair)
        assert_close(found, expected, rtol=1e-12, atol=1e-12)


@over_rows("ranks")
def test_losses_of_shares_average_to_that_of_the_batch(name: str) -> None:
    """What several processes compute, each of its share of the rows."""
    row = ROWS[name]
    model = row.build().eval()  # batch norm would see the share alone
    for which, batch in drawn(row, model).items():
        if row.not_shared and which == "upper":
            with pytest.raises(ValueError, match="override `shard`"):
                model.shard(batch, 0, 2)
            continue
        shares = [model.shard(batch, rank, 2) for rank in range(2)]
        for whole, *parts in zip(leaves(batch), *map(leaves, shares), strict=True):
            if whole.ndim and any(len(part) < len(whole) for part in parts):
                assert_same(torch.cat(parts), whole)
            else:  # what every process has whole
                assert all(torch.equal(part, whole) for part in parts)
        if row.mixes:
            continue
        whole, *parts = (with_gradient(model, which, each) for each in (batch, *shares))
        for expected, *found in zip(whole, *parts, strict=True):
            assert_close(sum(found) / 2, expected, rtol=1e-9, atol=1e-12)


def with_gradient(model: EBLVM, which: str, batch: Any) -> list[Tensor]:
    """A loss and its gradient in the variables of both levels."""
    loss = value(evaluate(model, which, batch))
    moved = list(variables(model).values())
    grads = torch.autograd.grad(loss, moved, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *grads]


# ---------------------------------------------------------------------- training


@each_device
@over_rows("resume")
def test_a_run_is_repeated_and_resumed_to_the_bit(name: str, device: str, tmp_path: Path) -> None:
    row = ROWS[name]
    run, v = tmp_path / "run", row.data(BATCH)

    def measured(model: EBLVM) -> dict[str, float]:
        return {
            "energy": float(model.energy(v).mean()),
            "sample": float(model.sample(1).double().mean()),
        }

    with untouched(device):
        looked_at = {"evaluate": measured, "evaluate_every": 2, "best": "lowest energy"}
        trained(row, device, num_steps=2, run=run, **looked_at)
    resumed = trained(row, device, run=run, resume=True)
    assert_same(tensors(resumed), tensors(kept(name, device)))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert len((run / "evaluations.jsonl").read_text().splitlines()) == 1
    assert_same(tensors(type(resumed).load(run / "model", **made_of(row))), tensors(resumed))


@each_device
@over_rows("training")
def test_training_moves_what_it_should(name: str, device: str) -> None:
    before, after = tensors(ROWS[name].build(device)), kept(name, device)
    assert not any(module.training for module in after.modules())
    for variable, p in after.named_parameters():
        assert p.isfinite().all()
        assert not p.requires_grad or not torch.equal(p, before[variable]), variable


@pytest.mark.usefixtures("traced_only")
@over_rows("traced", TRACED)
def test_a_traced_run_equals_the_eager_one(name: str) -> None:
    traced = trained(ROWS[name], "cpu", compile=True)
    assert_close(tensors(traced), tensors(kept(name, "cpu")), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------- saving


@each_device
@over_rows("save")
def test_a_saved_model_says_the_same(name: str, device: str, tmp_path: Path) -> None:
    row, model = ROWS[name], kept(name, device)
    model.save(tmp_path)
    loaded = type(model).load(tmp_path, **made_of(row)).to(device)
    loaded.visible_shape = model.visible_shape
    assert_same(tensors(loaded), tensors(model))
    assert not any(module.training for module in loaded.modules())
    assert_same(said_by(row, loaded), said_by(row, model))
    assert_same(losses_of(row, loaded), losses_of(row, model))  # the settings of the losses, too
    loaded.save(tmp_path / "again")
    first, second = ((at / "model.json").read_text() for at in (tmp_path, tmp_path / "again"))
    assert json.loads(first) == json.loads(second)
    assert json.loads(first)["method"] == type(model).__name__
    assert (json.loads(first)["recipe"] is None) == (row.modules is not None)
    if row.modules is not None:
        with pytest.raises(ValueError, match="made of your own modules"):
            type(model).load(tmp_path)


@over_rows("state")
def test_a_model_says_what_its_state_says(name: str) -> None:
    """Nothing that is learned lies beside the tensors, and all that is said comes from them."""
    row, model = ROWS[name], kept(name, "cpu")
    other = row.build().eval()
    other.load_state_dict(model.state_dict())
    said, losses = heard(name)
    assert_same(said_by(row, other), said)
    assert_same(losses_of(row, other), losses)
    other.float()  # draws differ from those in float64, so the numbers may
    assert other.energy(row.data(BATCH)).dtype == torch.float32
    assert other.energy(row.data(BATCH)).isfinite().all()


@over_rows("copy")
def test_a_copy_is_independent(name: str) -> None:
    row, model = ROWS[name], kept(name, "cpu")
    before, (said, _) = tensors(model), heard(name)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert_same(tensors(twin), before)
    assert_same(said_by(row, twin), said)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.01)
    other = said_by(row, twin)
    assert any(not torch.equal(other[each], said[each]) for each in said)
    assert_same(tensors(model), before)
    assert_same(said_by(row, model), said)
    twin.load_state_dict(model.state_dict())
    assert_same(said_by(row, twin), said)


def said_by(row: Row, model: EBLVM) -> dict[str, Tensor]:
    """Everything a trained model says."""
    v = row.data(BATCH).to(model.device)
    said = {name: call(v) for name, call in answers(row, model).items()}
    return {**said, "sample": model.sample(3, rng(2, model.device))}


def losses_of(row: Row, model: EBLVM) -> dict[str, Tensor]:
    """The losses of a turn; of a copy, as drawing may move chains."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        return {which: value(evaluate(twin, which, b)) for which, b in drawn(row, twin).items()}


# ---------------------------------------------------------------------- refusals


def spoilt(row: Row, model: EBLVM) -> dict[str, Tensor]:
    """Visibles that a model must not take."""
    v = row.data(ROWS_OF_DATA)
    if row.table:
        return {"none": v[:0], "a row that is not there": v + 1, "not whole": v + 0.5}
    nan, infinite = v.clone(), v.clone()
    nan[2].view(-1)[1], infinite[5].view(-1)[0] = float("nan"), float("inf")
    found = {"none": v[:0], "wide": torch.cat([v, v], -1), "NaN": nan, "infinite": infinite}
    if model.visible_range is not None:
        found["out of range"] = torch.full_like(v, 7)
        found["counts"] = (v * 0 + 5).long()
    if model.binary:
        found["greys"] = torch.full_like(v, 0.5)
    return found


@each_device
@over_rows("refusals")
def test_bad_visibles_are_refused_before_the_first_step(
    name: str, device: str, tmp_path: Path
) -> None:
    row = ROWS[name]
    model = row.build(device)
    before = tensors(model)
    for kind, v in spoilt(row, model).items():
        print(kind)  # shown if it fails
        for call in answers(row, model).values():
            with pytest.raises((ValueError, TypeError)):
                call(v.to(device))
        with pytest.raises((ValueError, TypeError)):
            model.fit(v.to(device), num_steps=1, batch_size=BATCH, run=tmp_path / "run")
        assert not (tmp_path / "run").exists()
        assert_same(tensors(model), before)


@over_rows("unknown", [name for name, row in ROWS.items() if row.modules and not row.table])
def test_own_modules_are_asked_what_they_take(name: str, tmp_path: Path) -> None:
    """Where the shape of a visible is not known, a network that cannot take one is named at once."""
    row = ROWS[name]
    model = row.build()
    model.visible_shape = None
    before, v = tensors(model), row.data(ROWS_OF_DATA)
    with pytest.raises(ValueError, match=r"^the (energy|posterior|encoder|model)"):
        model.fit(torch.cat([v, v], 1), num_steps=1, batch_size=BATCH, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert_same(tensors(model), before)
    assert model.fit(v, num_steps=1, batch_size=BATCH).steps == 1


# ---------------------------------------------------------------------- the trained model


@each_device
@over_rows("answers")
def test_answers_are_functions_of_the_row(name: str, device: str) -> None:
    """Of the row alone: not of its place, its company or the call; and nothing is changed by asking."""
    row, model = ROWS[name], kept(name, device)
    v = row.data(6).to(device)
    order = torch.tensor([4, 2, 0, 5, 1, 3], device=device)
    before = tensors(model)
    for which, call in answers(row, model).items():
        with untouched(device):
            whole = call(v)
        assert len(whole) == len(v)
        assert whole.isfinite().all()
        assert not whole.requires_grad
        assert_same(call(v), whole)
        if which in row.moving:
            continue
        # products of matrices of other sizes add in another order
        assert_close(call(v[order]), whole[order], rtol=1e-10, atol=1e-10)
        alone = torch.cat([call(v[i : i + 1]) for i in range(len(v))])
        assert_close(alone, whole, rtol=1e-10, atol=1e-10)
    assert_same(tensors(model), before)


@over_rows("asking")
def test_asking_a_model_that_is_in_training_changes_nothing(name: str) -> None:
    row = ROWS[name]
    model = row.build().train()
    before, modes = tensors(model), [module.training for module in model.modules()]
    said = said_by(row, model)
    assert_same(tensors(model), before)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert_same(said_by(row, model.eval()), said)


@each_device
@over_rows("shapes")
def test_answers_have_their_shapes(name: str, device: str) -> None:
    row, model = ROWS[name], kept(name, device)
    v = row.data(6).to(device)
    assert model.energy(v).shape == (6,)
    for which in row.not_there:
        with pytest.raises(NotImplementedError, match=r"`\w+`"):
            getattr(model, which)(v)
    if "posterior" not in row.not_there:
        posterior = model.posterior(v)
        assert posterior.batch_shape == (6,)
        assert posterior.log_prob(posterior.sample()).shape == (6,)
    if "reconstruct" not in row.not_there:
        assert model.reconstruct(v).shape == v.shape
        assert within(model, model.reconstruct(v))


@each_device
@over_rows("samples")
def test_samples_are_visibles_from_the_generator_alone(name: str, device: str) -> None:
    row, model = ROWS[name], kept(name, device)
    before = tensors(model)
    with untouched(device):
        one, other, third = (model.sample(6, rng(seed, model.device)) for seed in (1, 1, 2))
    assert_same(other, one)
    assert not torch.equal(third, one)
    like = row.data(6)
    assert one.shape == like.shape
    assert one.dtype == like.dtype
    assert one.device == model.device
    assert within(model, one)
    assert_same(tensors(model), before)
    for n in (0, -1):
        with pytest.raises(ValueError, match="positive"):
            model.sample(n)


@each_device
@over_rows("chains")
def test_chains_are_a_machine_s(name: str, device: str) -> None:
    """Where a machine is sampled, Gibbs chains can be asked for; elsewhere they are refused by name."""
    row, model = ROWS[name], kept(name, device)

    def sample(seed: int) -> Tensor:
        return model.sample(2, rng(seed, model.device), start="coins", sweeps=1)

    if not row.chains:
        with pytest.raises(ValueError, match="is for the Gibbs chains of a Boltzmann machine"):
            sample(1)
        return
    with untouched(device):
        assert within(model, sample(1))
    assert_same(sample(1), sample(1))


@over_rows("score")
def test_the_score_is_minus_the_slope_of_the_energy(name: str) -> None:
    """By differences along a direction, which know nothing of graphs; refused where there is none."""
    row, model = ROWS[name], kept(name, "cpu")
    v = row.data(6)
    before = tensors(model)
    if not model.latent_model.visibles.real:
        with pytest.raises(
            NotImplementedError, match=f"`{type(model).__name__}` are (bits|numbers)"
        ):
            model.score(v)
        return
    score, energy = model.score(v), model.energy_function
    assert_same(model.score(v), score)
    along, size = torch.randn(v.shape, generator=rng(7), dtype=v.dtype), 1e-6
    with torch.no_grad():
        one, two = (energy(v + k * size * along) - energy(v - k * size * along) for k in (1, 2))
    slope = (8 * one - two) / (12 * size)
    assert_close((-score * along).flatten(1).sum(1), slope, rtol=1e-6, atol=1e-7)
    graph = model.energy(v, grad=True)
    assert_same(graph.detach(), model.energy(v))
    assert graph.requires_grad
    assert_same(tensors(model), before)
    assert all(p.grad is None for p in model.parameters())


@each_device
@over_rows("sampler")
def test_samplers_start_anywhere_and_change_nothing(name: str, device: str) -> None:
    row, model = ROWS[name], kept(name, device)
    before = tensors(model)
    sampler = HamiltonianMonteCarlo(num_steps=1, step_size=0.02, num_leapfrog=2)
    for start in (row.data(2).to(device), "noise"):
        ask = partial(model.sample, 3, sampler=sampler, start=start)
        if not model.latent_model.visibles.real:
            with pytest.raises(NotImplementedError, match="needs a density over real visibles"):
                ask()
            continue
        with untouched(device):
            one, other = (ask(rng(1, model.device)) for _ in range(2))
        assert_same(other, one)
        assert one.shape == row.data(3).shape
        assert one.dtype == torch.float64
        assert within(model, one)
    assert_same(tensors(model), before)


def within(model: EBLVM, v: Tensor) -> bool:
    """Whether these are finite, and lie where the model's visibles do."""
    low, high = model.visible_range or (-torch.inf, torch.inf)
    return bool(v.isfinite().all()) and float(v.min()) >= low and float(v.max()) <= high
