"""From trained folds to the report."""

rule validate:
    input:
        "train/{run}/{dataset}/{model}/fold_{fold}.json",
    output:
        "evaluation/{run}/{dataset}/{model}/fold_{fold}/summary.json",
    log:
        "logs/validate/{run}/{dataset}/{model}/fold_{fold}.log",
    threads: STUDY.threads
    shell:
        "{STEP} validate {FILE} {output} {wildcards.run} {wildcards.dataset} {wildcards.model} {wildcards.fold}"
        " > {log} 2>&1"

rule find_best:
    input:
        lambda w: [f for m in GRAPH.models(w.dataset, w.variant) for f in GRAPH.folds_trained(w.run, m)],
    output:
        "best/{run}/{dataset}/{variant}.json",
    log:
        "logs/find_best/{run}/{dataset}/{variant}.log",
    threads: STUDY.threads
    shell:
        "{STEP} find_best {FILE} {output} {wildcards.run} {wildcards.dataset} {wildcards.variant} > {log} 2>&1"

rule predict:
    input:
        "best/{run}/{dataset}/{variant}.json",
    output:
        "done/predict/{run}/{dataset}/{variant}.json",
    log:
        "logs/predict/{run}/{dataset}/{variant}.log",
    threads: STUDY.threads
    resources:
        gpu=GPU,
    shell:
        "{STEP} predict {FILE} {output} {wildcards.run} {wildcards.dataset} {wildcards.variant} > {log} 2>&1"

rule evaluate:
    input:
        "done/predict/{run}/{dataset}/{variant}.json",
    output:
        "test/{run}/{dataset}/{variant}/summary.json",
    log:
        "logs/evaluate/{run}/{dataset}/{variant}.log",
    threads: STUDY.threads
    shell:
        "{STEP} evaluate {FILE} {output} {wildcards.run} {wildcards.dataset} {wildcards.variant} > {log} 2>&1"

rule report:
    input:
        [file for files in JOBS.values() for file in files],
    output:
        "report.html",
    log:
        "logs/report.log",
    shell:
        "{STEP} report {FILE} {output} > {log} 2>&1"
