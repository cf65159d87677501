"""Lets torchvision be imported beside a torch that its compiled operators were not built for.

nnU-Net's trainer search imports timm, and timm imports torchvision. With a CPU build of torch beside the torchvision of
the package index, which is built for CUDA, that import ends in "operator torchvision::nms does not exist": torchvision
survives that its library does not load, but not that two operators, whose schemas the library holds, are unknown. So
the schemas are declared here, without an implementation, as soon as torch is imported (torch then calls the entry
points of the group ``torch.backends``). Nothing in nnU-Net or in this plugin calls the two.

``make`` installs this into its own environment, and only where torchvision cannot be imported otherwise.
"""


def declare() -> None:
    import torch

    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
