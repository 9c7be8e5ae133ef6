"""Problems that know their own truth: what solvers are compared on, one file for each kind."""
