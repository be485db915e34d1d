"""Experiments: programs that use the library. The library does not depend on them."""
