"""How good a trained model is: its samples, reconstructions and out-of-distribution scores."""

from bilevel.methods.evaluation.evaluate import evaluate, ood_auroc, pca_rmse, reconstruction_rmse

__all__ = ["evaluate", "ood_auroc", "pca_rmse", "reconstruction_rmse"]
