"""Times full-size models with random weights on one GPU, against diffusers, in few minutes.

`python -m examples.gpu` measures the rows of `rows` on the models of `models`: each in a process of
`worker`'s, by `measure`, until the time is over. `savings` counts weights, without a GPU, and
`document` makes the tables.
"""
