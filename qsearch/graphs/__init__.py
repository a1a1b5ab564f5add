"""A model as a graph: which layers it has, what they are for, how data flows between them."""
