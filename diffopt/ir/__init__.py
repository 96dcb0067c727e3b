"""The intermediate representation: programs of torch.fx graphs, and what every rewrite needs."""
