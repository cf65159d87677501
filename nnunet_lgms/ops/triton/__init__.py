"""Triton kernels of the operators, for NVIDIA GPUs: private, chosen by the operators of :mod:`nnunet_lgms.ops`."""
