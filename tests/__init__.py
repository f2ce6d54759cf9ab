"""The tests are no part of the package; what they share is imported from ``tests.helpers``."""

import benchmarks  # noqa: F401  puts the project's root last on the path
