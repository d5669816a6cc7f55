"""What `make bench` runs: `python -m benchmarks --help`; what is measured and why is told in docs/benchmarks.md."""
