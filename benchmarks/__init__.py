"""What mixing costs, measured: ``python -m benchmarks.cost`` and ``python -m benchmarks.startup`` from the checkout."""
