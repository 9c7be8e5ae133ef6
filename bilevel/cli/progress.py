"""Progress on the command line: the stages of a command, and a training."""

from bilevel.methods.training.display import duration as duration
from bilevel.methods.training.display import stages as stages
from bilevel.methods.training.progress import Progress as Progress
