"""What people read: reports, tables, plots, model cards."""
