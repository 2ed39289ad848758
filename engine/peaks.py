"""Model FLOPs utilisation (MFU): the speed of a training step beside the peak speed of its GPU."""

import re

import torch

# Dense bf16 tensor-core peaks in TFLOP/s from the vendors' data sheets (fp16 for V100 and T4).
# The first of these names that occurs in a device's name counts.
PEAK_TFLOPS = {
    "GB200": 2500, "B300": 2250, "B200": 2250, "H200 NVL": 835, "H200": 989, "GH200": 989,
    "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H800": 989, "H20": 148, "A100": 312,
    "A800": 312, "A10G": 70, "A10": 125, "A40": 150, "RTX A6000": 155, "L40S": 362, "L40": 181,
    "L4": 121, "T4": 65, "V100": 125, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71,
    "MI300X": 1307, "MI250X": 383,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """The FLOP/s in bf16 that a GPU's data sheet promises; None for a GPU not in the table."""
    for name, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            return tflops * 1e12
    return None


def device_peak(device: torch.device) -> float | None:
    """`peak_flops` of this device; None for a CPU."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def flops_per_token(model: torch.nn.Module, T: int) -> int:
    """What training a GPT on sequences of T tokens costs per token, whichever the attention.

    6 N + 12 n_layer C T (PaLM, appendix B, https://arxiv.org/abs/2204.02311), where N leaves out
    the position embeddings, and 2 less for each of the N weights that is frozen.
    """
    positions = set(model.transformer.wpe.parameters())
    weights = [p for p in model.parameters() if p not in positions]
    matrices = sum(p.numel() * (6 if p.requires_grad else 4) for p in weights)
    return matrices + 12 * model.config.n_layer * model.config.n_embd * T
