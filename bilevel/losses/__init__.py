"""How a loss of a problem is evaluated, and whether it is what a hypergradient takes it for.

`Oracles` evaluates losses with other tensors in the places of the variables (`slots`, `substitution`)
and reads what they return (`answers`). Before the first step a loss is examined (`purity`), and what
would go wrong without a word is refused: gradients that are lost on the way (`references`), hooks that
would not be called (`hooks`).
"""
