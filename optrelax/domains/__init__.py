"""Abstract domains: walkers that carry enclosures over a captured graph, one rule an op class."""
