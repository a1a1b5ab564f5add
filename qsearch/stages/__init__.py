"""Stages: one file a verb, with its settings, its cache key, what it reads and what it writes."""
