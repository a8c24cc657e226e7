"""What people look at: plots, tables, files."""
