"""What ``madformer bench`` and the scripts under ``benchmarks/`` measure with: clocks, counted work, rates, rows."""
