"""The ops: one public function each, which validates and then dispatches to an implementation.

Import an op from its own file, as in ``from madformer.kernels.denoise_step import denoise_step``.
"""
