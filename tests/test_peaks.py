"""peaks.py: the peak speed of a GPU by its name."""

import pytest

from engine.peaks import peak_flops


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA B200", 2250),
        ("Some other GPU", None),
    ],
)
def test_peaks_are_found_by_the_name_of_the_gpu(name, tflops):
    assert peak_flops(name) == (tflops and tflops * 1e12)
