"""A study: data sets × variants × configurations × folds, run by the Snakemake workflow in ``workflow/``.

The schema of ``study.yaml``, the paths of what a study leaves behind, its steps and its report. What is run when, and
where, is Snakemake's.
"""
