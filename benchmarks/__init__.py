"""What mixing costs and what it brings, measured, from the checkout: ``python -m benchmarks.cost --help`` and so on.

``cost`` and ``startup`` measure time; ``images`` and ``schemes`` are what ``accuracy``, ``robustness`` and ``saliency``
run on; ``report`` turns their rows into tables and plots.
"""
