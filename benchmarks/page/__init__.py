"""The page of results, docs/benchmarks.md, made of benchmarks/results alone."""
