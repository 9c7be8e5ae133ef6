"""What `train` repeats, and what it looks at on the way.

`turn` draws the batches and takes the steps in their order, `steps` are the steps themselves, eager or
compiled. `watch` looks for numbers that run away, `remarks` for variables that stand still.
"""
