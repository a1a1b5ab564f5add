"""Pages made from code, from notebooks and from measured numbers; one module a family of pages."""
