"""Result files of the benchmarks: reading, comparing, plotting."""
