"""Certification: what each relaxation proves, image by image, and what an attack refutes."""
