"""The nouns: schemes, graphs, tables, trials, plans, and how they lie on disk."""
