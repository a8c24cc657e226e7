"""General convex programs as layers, and their solvers."""
