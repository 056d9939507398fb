"""The constants that were measured: medians of three calibrations each, on one thread, with cold caches."""

from __future__ import annotations

from collections.abc import Mapping

from samoyeds_compile.layout.rates import Kernel, Rates

# Intel, AVX-512 and AMX. Rows of bfloat16 strips are multiplied in pairs since; their third numbers are what had been
# measured before, times what that saved on the other machine.
AMX_KERNELS: Mapping[str, Kernel] = {
    "float32 dense": Kernel(Rates(275.4, 227.0, 15.94), Rates(450.3, 270.3, 12.22, 16)),
    "float32 columns": Kernel(Rates(359.6, 170.4, 28.03), Rates(1561.0, 1375.1, 13.16, 16)),
    "float32 1:1": Kernel(Rates(166.6, 75.5, 20.76), Rates(360.4, 176.1, 11.06, 16)),
    "float32 1:2": Kernel(Rates(106.1, 50.7, 12.59), Rates(205.7, 109.9, 6.08, 16)),
    "float32 2:4": Kernel(Rates(106.4, 54.5, 12.38), Rates(202.5, 93.5, 6.93, 16)),
    "float32 1:2/16": Kernel(Rates(108.3, 52.3, 12.64), Rates(208.4, 114.0, 6.74, 16)),
    "bfloat16 dense": Kernel(Rates(183.9, 146.5, 15.79), Rates(182.0, 150.9, 3.17, 16)),
    "bfloat16 columns": Kernel(Rates(177.7, 56.7, 26.61), Rates(657.4, 634.2, 2.75, 16)),
    "bfloat16 1:1": Kernel(Rates(127.2, 46.5, 20.24), Rates(192.4, 161.9, 2.77, 16)),
    "bfloat16 1:2": Kernel(Rates(71.6, 32.4, 12.66), Rates(129.2, 97.4, 3.05, 16)),
    "bfloat16 2:4": Kernel(Rates(76.3, 35.4, 13.00), Rates(136.6, 93.6, 3.14, 16)),
    "bfloat16 1:2/16": Kernel(Rates(75.0, 31.3, 12.67), Rates(127.5, 106.6, 2.27, 16)),
    "bfloat16 1:2 strips": Kernel(Rates(63.6, 32.1, 4.90), Rates(72.5, 52.3, 2.62)),
    "float32 1:2 strips": Kernel(Rates(99.2, 70.0, 7.66), Rates(180.7, 102.5, 5.37, 16)),
    "bfloat16 1:1 strips": Kernel(Rates(102.2, 49.9, 7.60), Rates(110.6, 85.8, 3.71)),
    "float32 1:1 strips": Kernel(Rates(168.0, 108.6, 12.28), Rates(331.4, 177.2, 9.56, 16)),
    "bfloat16 2:4 strips": Kernel(Rates(68.0, 40.5, 5.50), Rates(87.9, 70.7, 3.09)),
    "float32 2:4 strips": Kernel(Rates(98.0, 64.7, 8.61), Rates(193.8, 116.7, 4.74, 16)),
    "bfloat16 1:2/16 strips": Kernel(Rates(66.9, 31.6, 4.00), Rates(73.6, 55.6, 2.29)),
    "float32 1:2/16 strips": Kernel(Rates(99.7, 62.4, 9.80), Rates(179.3, 105.0, 5.07, 16)),
}
AMX_LIBRARY: Mapping[str, Rates] = {
    "float32": Rates(343.8, 618.3, 16.92),
    "bfloat16": Rates(396.3, 361.9, 3.54),
}

# AMD, AVX-512 with products of bfloat16 pairs.
PAIRS_KERNELS: Mapping[str, Kernel] = {
    "float32 dense": Kernel(Rates(243.6, 240.1, 20.36), Rates(484.1, 174.2, 19.79, 16)),
    "float32 columns": Kernel(Rates(239.2, 66.5, 33.67), Rates(991.8, 665.7, 21.43, 16)),
    "float32 1:1": Kernel(Rates(138.1, 84.6, 29.50), Rates(333.2, 170.5, 10.67, 16)),
    "float32 1:2": Kernel(Rates(76.9, 45.7, 16.93), Rates(178.3, 87.5, 6.12, 16)),
    "float32 2:4": Kernel(Rates(71.5, 37.8, 17.12), Rates(195.8, 107.3, 5.68, 16)),
    "float32 1:2/16": Kernel(Rates(73.1, 39.4, 17.02), Rates(181.3, 88.6, 6.13, 16)),
    "bfloat16 dense": Kernel(Rates(129.7, 156.3, 11.05), Rates(349.0, 202.8, 9.34, 16)),
    "bfloat16 columns": Kernel(Rates(157.2, 49.1, 28.47), Rates(423.4, 267.6, 9.64, 16)),
    "bfloat16 1:1": Kernel(Rates(84.1, 38.1, 30.28), Rates(761.5, 616.5, 7.34, 16)),
    "bfloat16 1:2": Kernel(Rates(59.5, 32.6, 16.90), Rates(423.4, 371.9, 2.83, 16)),
    "bfloat16 2:4": Kernel(Rates(57.6, 35.9, 16.82), Rates(409.9, 361.3, 3.18, 16)),
    "bfloat16 1:2/16": Kernel(Rates(57.5, 32.0, 17.06), Rates(425.1, 369.7, 2.75, 16)),
    "bfloat16 1:2 strips": Kernel(Rates(56.2, 22.1, 6.09), Rates(195.0, 129.8, 4.31, 16)),
    "float32 1:2 strips": Kernel(Rates(84.7, 42.6, 9.19), Rates(223.6, 123.0, 6.49, 16)),
    "bfloat16 1:1 strips": Kernel(Rates(93.1, 56.1, 9.65), Rates(314.3, 198.3, 7.80, 16)),
    "float32 1:1 strips": Kernel(Rates(132.4, 62.9, 16.42), Rates(400.4, 213.1, 11.34, 16)),
    "bfloat16 2:4 strips": Kernel(Rates(58.7, 23.3, 7.44), Rates(199.1, 136.8, 4.46, 16)),
    "float32 2:4 strips": Kernel(Rates(89.9, 33.0, 12.12), Rates(229.2, 130.7, 6.53, 16)),
    "bfloat16 1:2/16 strips": Kernel(Rates(59.7, 44.4, 5.20), Rates(172.9, 105.5, 4.61, 16)),
    "float32 1:2/16 strips": Kernel(Rates(82.8, 37.6, 13.10), Rates(204.5, 105.5, 6.36, 16)),
}
PAIRS_LIBRARY: Mapping[str, Rates] = {
    "float32": Rates(266.0, 512.6, 21.30),
    "bfloat16": Rates(319.6, 306.8, 9.91),
}
