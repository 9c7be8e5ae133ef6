"""Energy-based latent-variable models trained by bilevel optimization, one paper per file."""

if __name__ != "bilevel.methods":
    # Under another name every class would exist twice: `isinstance` and pickles would disagree.
    raise ImportError(f"import `bilevel.methods`, not `{__name__}`")

from bilevel.methods.bidvl import BiDVL
from bilevel.methods.bidvl_general import GeneralBiDVL
from bilevel.methods.config import Training
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.fitting import History

__all__ = ["EBLVM", "BiDVL", "GeneralBiDVL", "History", "Training"]
