"""From a download to preprocessed data and plans."""

rule convert:
    output:
        "done/convert/{dataset}.json",
    log:
        "logs/convert/{dataset}.log",
    threads: STUDY.threads
    shell:
        "{STEP} convert {FILE} {output} {wildcards.dataset} > {log} 2>&1"

rule plan:
    input:
        "done/convert/{dataset}.json",
    output:
        "done/plan/{dataset}/{plans}.json",
    log:
        "logs/plan/{dataset}/{plans}.log",
    threads: STUDY.threads
    shell:
        "{STEP} plan {FILE} {output} {wildcards.dataset} {wildcards.plans} > {log} 2>&1"

# Once per data identifier: plans that differ in the network alone share their data.
rule preprocess:
    input:
        lambda w: GRAPH.planned(w.dataset, planned_for(w.identifier)),
    output:
        "done/preprocess/{dataset}/{identifier}.json",
    log:
        "logs/preprocess/{dataset}/{identifier}.log",
    threads: STUDY.threads
    shell:
        "{STEP} preprocess {FILE} {output} {wildcards.dataset} {wildcards.identifier} > {log} 2>&1"

# Kernels may be chosen from the data set's labels, which planning and preprocessing leave as they are.
rule override:
    input:
        lambda w: GRAPH.planned(w.dataset, GRAPH.base_of(w.dataset, w.plans)),
    output:
        "done/override/{dataset}/{plans}.json",
    log:
        "logs/override/{dataset}/{plans}.log",
    shell:
        "{STEP} override {FILE} {output} {wildcards.dataset} {wildcards.plans} > {log} 2>&1"
