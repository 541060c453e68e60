"""What mixing costs and what it brings, measured, from the checkout: ``python -m benchmarks.cost --help`` and so on.

``cost`` and ``startup`` measure time, by ``timing``; ``images`` and ``schemes`` are what ``accuracy``, ``robustness``
and ``saliency`` run on; ``tuning`` runs ``accuracy`` with a learning rate for each scheme; ``report`` turns their rows
into tables and plots, by ``comparisons`` and ``figures``.
"""
