"""Benchmarks that anyone can run on a card of their own."""
