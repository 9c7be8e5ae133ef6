"""Energy-based latent-variable models trained by bilevel optimization, one paper per file."""

if __name__ != "bilevel.methods":
    # Under another name every class would exist twice: `isinstance` and pickles would disagree.
    raise ImportError(f"import `bilevel.methods`, not `{__name__}`")

from bilevel.methods.advil import AdvIL
from bilevel.methods.bidvl import BiDVL
from bilevel.methods.bism import BiSM
from bilevel.methods.contrastive_divergence import ContrastiveDivergence
from bilevel.methods.data.showing import show
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.general_bidvl import GeneralBiDVL
from bilevel.methods.machines import DBM, RBM, GaussianDBM, GaussianRBM
from bilevel.methods.maximum_likelihood import MaximumLikelihood
from bilevel.methods.noise_contrastive import NoiseContrastive
from bilevel.methods.score_matching import ScoreMatching
from bilevel.methods.training.history import History, load_records
from bilevel.methods.training.settings import Training
from bilevel.methods.vae import VAE
from bilevel.methods.vages import VaGES

__all__ = [
    "DBM",
    "EBLVM",
    "RBM",
    "VAE",
    "AdvIL",
    "BiDVL",
    "BiSM",
    "ContrastiveDivergence",
    "GaussianDBM",
    "GaussianRBM",
    "GeneralBiDVL",
    "History",
    "MaximumLikelihood",
    "NoiseContrastive",
    "ScoreMatching",
    "Training",
    "VaGES",
    "load_records",
    "show",
]
