"""Back-substitution through convolutions planned once: a list of compiled steps, run on some rows at a time.

The rules of `backsubstitution` and `windows` keep every coefficient of a target's rows until its gradient has been
taken: gigabytes, which the machine hands out page by page. Here the same products are made for as many rows as fit a
small workspace, and made again for the gradient, which is written by hand. A row is any neuron of the target, of any
example: all of a map, or those that matter. To nearest, on a CPU with a compiler, for convolutions without groups; what
has no step here is left to the rules.

`planning` finds the steps of a target; `running` runs them.
"""
