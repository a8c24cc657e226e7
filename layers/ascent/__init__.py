"""Dual ascent on network LPs."""
