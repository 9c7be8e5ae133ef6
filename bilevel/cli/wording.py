"""The command line's spelling: mathematics in plain letters, Python's names as flags, other names."""

import re
from collections.abc import Collection, Iterable

from bilevel.methods.training.settings import ELSEWHERE, EPOCHS

_SYMBOLS = (
    (r"\\[td]?frac\s*(\d)\s*(\d)", r"\1/\2 "),
    (r"\\[td]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1)/(\2)"),
    (r"\\l[vV]ert\s*|\s*\\r[vV]ert", "|"),
    (r"\\(?:hat|bar|tilde)\s*\{?(\w+)\}?", r"\1_hat"),
    (r"\\nabla\s*_\s*\{?(\w+)\}?", r"grad_\1"),
    (r"\\(?:mathbb|mathrm|mathcal|operatorname|text)\s*\{?(\w+)\}?", r"\1"),
    (r"\\(?:left|right|big|Big)(?![a-zA-Z])", ""),
    (r"\\cdot(?![a-zA-Z])", "*"),
    (r"\\[,;:! ]", " "),
    (r"\\([a-zA-Z]+)", r"\1"),
    (r"[{}\\]", ""),
    (r"\s+", " "),
)
_FOLDERS = ("output", "output_dir", "out_dir", "save_dir", "log_dir", "logdir", "save", "name", "o")
_OTHER_NAMES: dict[str, tuple[str, ...]] = {  # what options are called elsewhere
    **ELSEWHERE,
    **dict.fromkeys(EPOCHS, ("num_steps", "steps")),
    **dict.fromkeys(("steps", "iterations", "max_steps", "num_steps"), ("num_steps", "steps")),
    **dict.fromkeys(("batch", "batchsize", "bs"), ("batch_size",)),
    **dict.fromkeys((*_FOLDERS, "out", "run", "folder"), ("run", "out")),
    **dict.fromkeys(("gpu", "gpus", "cuda", "accelerator"), ("device",)),
    **dict.fromkeys(("fp16", "bf16", "amp", "half", "mixed_precision", "dtype"), ("precision",)),
    **dict.fromkeys(("optimizer", "optim"), ("upper_lr", "lower_lr", "betas")),
    **dict.fromkeys(("momentum", "beta", "beta1", "beta2"), ("betas",)),
    **dict.fromkeys(("config", "cfg", "preset"), ("preset", "config")),
    **dict.fromkeys(("dataset", "data_dir", "data_path", "images", "input"), ("data",)),
    **dict.fromkeys(("size", "image_size", "img_size", "resolution"), ("side",)),
    **dict.fromkeys(("n", "num", "count", "samples", "num_samples"), ("n", "samples")),
    **dict.fromkeys(("z_dim", "latent", "latents", "hidden", "h_dim"), ("latent_dim",)),
    **dict.fromkeys(("fid", "metric", "metrics"), ("features",)),
    **dict.fromkeys(("resume_from", "continue", "restart", "checkpoint"), ("resume",)),
    **dict.fromkeys(("force", "replace"), ("overwrite",)),
    **dict.fromkeys(("filters", "ngf", "ndf", "channels_width"), ("width",)),
}
_SOLVERS = re.compile(r"`(Alternating|Implicit|Unrolled)(?:\([^`]*\))?`")
_IN_TICKS = re.compile(r"`(\w+(?:=[^`]+)?)`")
_BARE = re.compile(r"(?<![\w.`(])([a-z_]+)='([^']*)'")


def plain(text: str) -> str:
    r"""Text of a docstring as a terminal shows it: its mathematics in plain letters.

    Example:
        >>> plain(r"add $\frac12 \lVert h \rVert^2$ to the energy")
        'add 1/2 |h|^2 to the energy'
        >>> plain(r"$h - \tfrac12 \alpha \nabla_h E + \sigma \epsilon$")
        'h - 1/2 alpha grad_h E + sigma epsilon'
    """

    def letters(found: re.Match[str]) -> str:
        said = found[1]
        for pattern, instead in _SYMBOLS:
            said = re.sub(pattern, instead, said)
        return said.strip()

    spaced = re.sub(r"\$([^$]*)\$", letters, text)
    return spaced.replace("`", "")


def as_flag(name: str) -> str:
    """An option's name on the command line.

    Example:
        >>> as_flag("upper_lr"), as_flag("n")
        ('--upper-lr', '-n')
    """
    return ("-" if len(name) == 1 else "--") + name.replace("_", "-")


def as_flags(message: str, names: Collection[str]) -> str:
    """A message that names options as Python does, in the spelling of the command line.

    Args:
        message: the message.
        names: of the options there are, in Python.

    Example:
        >>> as_flags("`seed` is 0; load with `side=32, channels=1`", ("seed", "side", "channels"))
        '`--seed` is 0; load with `--side 32 --channels 1`'
        >>> as_flags("use variant='complete' or `Alternating()`", ("variant",))
        'use `--variant complete` or `--solver alternating`'
    """

    def spelled(found: re.Match[str]) -> str:
        pairs = [part.partition("=") for part in found[1].split(", ")]
        if not all(name in names for name, _, _ in pairs):
            return found[0]
        return "`" + " ".join(_option(name, value) for name, _, value in pairs) + "`"

    message = _IN_TICKS.sub(spelled, message)
    message = _BARE.sub(
        lambda found: f"`{_option(found[1], found[2])}`" if found[1] in names else found[0], message
    )
    return _SOLVERS.sub(lambda found: f"`--solver {found[1].lower()}`", message)


def _option(name: str, value: str) -> str:
    value = value.strip("\"'")
    return as_flag(name) if value in ("", "True") else f"{as_flag(name)} {value}"


def meant(name: str, known: Iterable[str]) -> str | None:
    """A hint at the options that an option of another program stands for; `None` if there are none.

    Args:
        name: as it was written, with its dashes.
        known: the options there are.

    Example:
        >>> meant("--learning_rate", ["--upper-lr", "--lower-lr"])
        'did you mean `--upper-lr` or `--lower-lr`?'
    """
    known, bare = list(known), name.lstrip("-").replace("-", "_").lower()
    same = [option for option in known if option.lstrip("-").replace("-", "_") == bare]
    found = same or [
        as_flag(other) for other in _OTHER_NAMES.get(bare, ()) if as_flag(other) in known
    ]
    if not found:
        return None
    if bare in EPOCHS:
        return f"give `{found[0]}`: an epoch of n images has n // (batch size) of them"
    *most, last = [f"`{option}`" for option in found]
    return f"did you mean {', '.join(most) + ' or ' if most else ''}{last}?"
