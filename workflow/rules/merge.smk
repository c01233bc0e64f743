def merged_models(wildcards):
    found = []
    for reference, made_here in PLAN.merge_models(wildcards.run):
        found += [reference] if made_here else weights(reference)
    return found


rule merge:
    input:
        merged_models,
    output:
        directory("results/{run}/merge/model"),
    log:
        "logs/{run}/merge.log",
    benchmark:
        "benchmarks/{run}/merge.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=settings("merge"),
        code=code("merge"),
    script:
        "../scripts/merge.py"
