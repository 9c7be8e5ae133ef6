"""Energy-based latent-variable models trained by bilevel optimization, one paper per file."""

if __name__ != "bilevel.methods":
    # Under another name every class would exist twice: `isinstance` and pickles would disagree.
    raise ImportError(f"import `bilevel.methods`, not `{__name__}`")
