"""What people look at: tables, plots, a page."""
