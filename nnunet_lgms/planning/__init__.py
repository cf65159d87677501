"""Plans: overriding them, kernels from a dataset, planning for a graphics card, what a plan costs."""
