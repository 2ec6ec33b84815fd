"""FP8 and NVFP4: what is stored of a weight, and the arithmetic between it and the weight. torch only.

``formats`` is data and needs no torch; ``nvfp4`` and ``fp8`` are the arithmetic, ``packing`` chooses between them.
"""
