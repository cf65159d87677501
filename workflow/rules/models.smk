"""What a network costs, and its training, fold by fold."""

def model_of(w):
    return GRAPH.model(w.dataset, w.model)

rule profile:
    input:
        lambda w: GRAPH.ready_plans(w.dataset, w.plans),
    output:
        "profile/{dataset}/{plans}__{configuration}.json",
    log:
        "logs/profile/{dataset}/{plans}__{configuration}.log",
    threads: STUDY.threads
    resources:
        gpu=GPU,
    shell:
        "{STEP} profile {FILE} {output} {wildcards.dataset} {wildcards.plans} {wildcards.configuration} > {log} 2>&1"

rule train:
    input:
        lambda w: GRAPH.preprocessed(w.dataset, model_of(w).data_identifier),
        lambda w: GRAPH.ready(model_of(w)),
        lambda w: GRAPH.previous_stage(w.run, model_of(w)),
    output:
        "train/{run}/{dataset}/{model}/fold_{fold}.json",
    log:
        "logs/train/{run}/{dataset}/{model}/fold_{fold}.log",
    threads: STUDY.threads
    resources:
        gpu=GPU,
    shell:
        "{STEP} train {FILE} {output} {wildcards.run} {wildcards.dataset} {wildcards.model} {wildcards.fold}"
        " >> {log} 2>&1"

rule zeroshot:
    input:
        lambda w: GRAPH.folds_trained(w.run, model_of(w)),
        lambda w: [GRAPH.converted(dataset) for dataset in STUDY.datasets[w.dataset].zeroshot],
    output:
        "zeroshot/{run}/{dataset}/{model}/zeroshot.json",
    log:
        "logs/zeroshot/{run}/{dataset}/{model}.log",
    threads: STUDY.threads
    resources:
        gpu=GPU,
    shell:
        "{STEP} zeroshot {FILE} {output} {wildcards.run} {wildcards.dataset} {wildcards.model} > {log} 2>&1"
