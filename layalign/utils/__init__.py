"""Helpers for all packages above: errors, files, untrusted input, versions of other packages."""
