"""Reading, comparing and plotting the result files of the benchmarks."""
