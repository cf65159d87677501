"""Forms of the operators that are fast on a CPU: private, chosen by the operators of :mod:`nnunet_lgms.ops`."""
