"""What things say of themselves: a few lines that tell what they are, whatever state they are in."""

import copy
import re

import torch
from torch import Tensor, nn

from bilevel import (
    Alternating,
    Hypergradient,
    Implicit,
    Problem,
    Step,
    check_hypergradient,
    train,
)
from bilevel.cards import Card, curves, digits


def upper_loss(x: dict[str, Tensor], y: dict[str, Tensor], batch: object) -> Tensor:
    return (y["w"] - 3).square().sum()


def lower_loss(x: dict[str, Tensor], y: dict[str, Tensor], batch: object) -> Tensor:
    return (y["w"] - x["a"].sin()).square().sum()


def tiny() -> Problem:
    one = torch.ones(2, dtype=torch.float64)
    return Problem.from_functions(upper_loss, lower_loss, {"a": one}, {"w": 0 * one})


class Own(Problem):
    """A problem of somebody's own."""

    def __init__(self, upper: nn.Module, lower: nn.Module) -> None:
        super().__init__()
        self.upper, self.lower = upper, lower

    def upper_loss(self, batch: Tensor) -> Tensor:
        raise NotImplementedError

    def lower_loss(self, batch: Tensor) -> Tensor:
        raise NotImplementedError


class Unfinished(Own):
    def __init__(self) -> None:
        self.early = repr(self)
        super().__init__(nn.Linear(2, 1), nn.Linear(2, 1))
        del self.lower


def said(thing: object) -> str:
    """Its text, after its HTML was found to hold the same words and no tag of theirs."""
    text = repr(thing)
    assert len(text.splitlines()) <= 12
    assert "<" not in re.sub(r"<[^<>]*>", "", thing._repr_html_())
    return text


def test_a_problem_of_two_functions() -> None:
    text = said(tiny())
    assert "losses  upper_loss (upper), lower_loss (lower)" in text
    assert re.search(r"upper +2 parameters in 1 tensor: a \(2,\)", text)
    assert re.search(r"lower +2 parameters in 1 tensor: w \(2,\)", text)
    assert re.search(r"on +cpu, float64", text)
    assert repr([copy.deepcopy(tiny())]) == f"[{text}]"
    assert text in str({"problem": tiny()})


def test_problems_in_every_state() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Linear(1, 1))
    network[0].requires_grad_(False)
    text = said(Own(network, nn.ModuleDict({"a": copy.deepcopy(network), "b": nn.Linear(2, 2)})))
    assert "upper   7 parameters in 4 tensors" in text
    assert "frozen: 16 parameters in 2 tensors" in text
    assert "13 parameters in 6 tensors: a (Sequential), b (Linear)" in text
    assert "lower   no variables" in said(Own(nn.Linear(2, 1), nn.ParameterDict()))
    nothing = Own(nn.ParameterDict(), nn.ParameterDict())
    assert "on      no parameters" in said(nothing)
    assert "on      meta, float32" in said(Own(nn.Linear(2, 1), nn.Linear(2, 1)).to("meta"))
    mixed = said(Own(nn.Linear(2, 1), nn.Linear(2, 1).double()))
    assert "on      cpu, float32 and float64" in mixed
    assert "2 of them without a shape yet" in said(Own(nn.LazyLinear(2), nn.Linear(2, 1)))


def test_a_problem_that_is_not_finished() -> None:
    problem = Unfinished()
    assert problem.early == "Unfinished, before `super().__init__()`"
    assert "lower   not set yet" in said(problem)


def test_a_problem_adds_lines_of_its_own_and_shows_its_layers() -> None:
    class Told(Own):
        stops_lower_gradient = "it is stopped at <here>"

        def extra_repr(self) -> str:
            return "temperature: 2\nfast=True"

    problem = Told(nn.Linear(2, 1), nn.Linear(2, 1))
    text = said(problem)
    assert re.search(r"temperature +2\n +settings +fast=True", text)
    assert "first order only: it is stopped at <here>" in text
    assert repr(problem.upper) == "Linear(in_features=2, out_features=1, bias=True)"
    inside = repr(nn.ModuleDict({"problem": problem}))
    assert "(problem): Told" in inside


def test_hypergradients_and_their_checks() -> None:
    answer = Implicit().hypergradient(tiny())
    text = said(answer)
    assert text.startswith("Hypergradient: the computation succeeded\n")
    for line in (
        "upper loss  18",
        "norm        4.585 over 1 variable",
        "a           [-3.242, -3.242]",
    ):
        assert line in text
    assert "direct_norm 0, response_norm 4.585" in repr(answer.stats)
    assert "curvature" not in repr(answer.stats)
    many = {f"x{k}": torch.ones(3, 3) for k in range(9)}
    assert "and 5 more" in said(Hypergradient(answer.value, many, answer.result, answer.stats))
    assert "shape (3, 3)" in repr(Hypergradient(answer.value, many, answer.result, answer.stats))
    right, wrong = (check_hypergradient(tiny(), s) for s in (Implicit(), Alternating()))
    assert said(right) == f"HypergradientCheck: {right.verdict}"
    assert "disagrees" in said(wrong)
    assert "VariableCheck of a: disagrees" in repr(wrong.variables)


def test_steps_and_states() -> None:
    problem = tiny()
    sgd = (torch.optim.SGD(level.parameters(), 0.1) for level in (problem.upper, problem.lower))
    upper, lower = sgd
    steps = list(train(problem, upper_optimizer=upper, lower_optimizer=lower, num_steps=2, ema=0.9))
    text = repr(steps)
    assert text.startswith("[Step 1: upper_loss ")
    assert text.count("\n") == 0
    assert "lower_residual" in text
    assert repr(steps[1].state) == (
        "State of FunctionProblem after 2 steps: upper by SGD, lower by SGD, with a moving average "
        "of the weights"
    )
    assert isinstance(steps[0], Step)


def test_numbers_that_cannot_be_read_do_no_harm() -> None:
    assert digits(torch.ones((), device="meta")) == "a tensor of shape ()"
    assert digits(torch.ones(2)) == "a tensor of shape (2,)"
    seen = []
    torch.func.vmap(lambda v: seen.append(digits(v)) or v)(torch.ones(2))
    assert seen == ["a number that is traced"]


def test_cards_escape_what_they_hold() -> None:
    html = Card("<b>", [("<i>", "<u>")]).html()
    for tag in ("<i>", "<u>", "<b><b>"):
        assert tag not in html
    assert "<code>F(x)</code>" in Card("of `F(x)`").html()
    drawn = curves({"a<b": [(1, 2.0), (2, float("nan")), (3, 4.0)], "short": [(1, 1.0)]})
    assert drawn.count("<polyline") == 1
    assert "a<b" not in drawn
    assert curves({"flat": [(1, 1.0), (2, 1.0)]}).count("nan") == 0
    assert curves({}) == ""
