"""Training: its settings, the loop of `fit`, the folder of a run and the files in it."""
