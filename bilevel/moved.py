"""What moved, under its earlier names, so that code and pickles written against those still run."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import final

NEW_NAMES = {
    "bilevel.answers": "bilevel.losses.answers",
    "bilevel.averaging": "bilevel.moving_average",
    "bilevel.compile.compiled": "bilevel.compile.compiled_step",
    "bilevel.compiled": "bilevel.compile.compiled_step",
    "bilevel.guards": "bilevel.compile.guards",
    "bilevel.hooks": "bilevel.losses.hooks",
    "bilevel.lowering": "bilevel.compile.lowering",
    "bilevel.purity": "bilevel.losses.purity",
    "bilevel.recorded": "bilevel.compile.cuda_graph",
    "bilevel.references": "bilevel.losses.references",
    "bilevel.remarks": "bilevel.loop.remarks",
    "bilevel.repeated": "bilevel.loaders",
    "bilevel.settings": "bilevel.compile.settings",
    "bilevel.substitution": "bilevel.losses.substitution",
    "bilevel.tracing": "bilevel.compile.tracing",
    "bilevel.turn": "bilevel.loop.turn",
    "bilevel.watch": "bilevel.loop.watch",
    "bilevel.wiring": "bilevel.losses.slots",
    "bilevel.methods.best": "bilevel.methods.training.best",
    "bilevel.methods.bidvl_general": "bilevel.methods.general_bidvl",
    "bilevel.methods.config": "bilevel.methods.training.settings",
    "bilevel.methods.deep_eblvm": "bilevel.methods.networks.deep",
    "bilevel.methods.densities": "bilevel.methods.data.densities",
    "bilevel.methods.features": "bilevel.methods.evaluation.features",
    "bilevel.methods.fidelity": "bilevel.methods.evaluation.fidelity",
    "bilevel.methods.fitting": "bilevel.methods.training.fit",
    "bilevel.methods.folders": "bilevel.methods.data.folders",
    "bilevel.methods.footprint": "bilevel.methods.training.footprint",
    "bilevel.methods.langevin": "bilevel.methods.models.langevin",
    "bilevel.methods.limits": "bilevel.methods.data.limits",
    "bilevel.methods.measures": "bilevel.methods.training.measures",
    "bilevel.methods.models.base": "bilevel.methods.machines.base",
    "bilevel.methods.models.dbm": "bilevel.methods.machines.dbm",
    "bilevel.methods.models.enumeration": "bilevel.methods.machines.enumeration",
    "bilevel.methods.models.hidden": "bilevel.methods.machines.hidden",
    "bilevel.methods.models.neighbours": "bilevel.methods.machines.neighbours",
    "bilevel.methods.models.rbm": "bilevel.methods.machines.rbm",
    "bilevel.methods.models.visible": "bilevel.methods.machines.visible",
    "bilevel.methods.page": "bilevel.methods.report.page",
    "bilevel.methods.pictures": "bilevel.methods.report.pictures",
    "bilevel.methods.pixels": "bilevel.methods.data.pixels",
    "bilevel.methods.preconditions": "bilevel.methods.training.preconditions",
    "bilevel.methods.published": "bilevel.methods.data.published",
    "bilevel.methods.records": "bilevel.methods.training.json_lines",
    "bilevel.methods.resnets": "bilevel.methods.networks.residual",
    "bilevel.methods.run": "bilevel.methods.training.run",
    "bilevel.methods.schemas": "bilevel.methods.training.schemas",
    "bilevel.methods.score_objectives": "bilevel.methods.objectives.score",
    "bilevel.methods.standardising": "bilevel.methods.training.standardising",
    "bilevel.methods.suite.learners": "bilevel.methods.suite.job",
    "bilevel.methods.tables": "bilevel.methods.data.tables",
    "bilevel.methods.vae_networks": "bilevel.methods.networks.perceptron",
    "bilevel.methods.visibles": "bilevel.methods.data.visibles",
    "bilevel.methods.weights": "bilevel.methods.training.weights",
}
"""Where each module is now, by the name it had before the rooms."""

NEW_HOMES = {"bilevel.problem": ("bilevel.functions", ("FunctionProblem", "Variables"))}
"""Where classes are now that pickles look for in another module."""


@final
class _Moved(MetaPathFinder, Loader):
    """Imports a module by its earlier name: the very module that has the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in NEW_NAMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(NEW_NAMES[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # the import system wrote the alias there


def follow() -> None:
    """Let earlier names be imported from here on."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
    for earlier, (new, names) in NEW_HOMES.items():
        home = importlib.import_module(new)
        vars(importlib.import_module(earlier)).update({name: getattr(home, name) for name in names})
