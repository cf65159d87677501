"""What ``benchmarks/evidence.py`` is made of, one step of the way a module."""
