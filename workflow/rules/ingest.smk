def training_files(wildcards):
    ingest = PLAN.config(wildcards.run).ingest
    found = []
    for name, dataset in ingest.train.items():
        found += raw_files(dataset.path, f"ingest.train.{name}.path")
    return found + (raw_files(ingest.corpus, "ingest.corpus") if ingest.corpus else [])


rule ingest:
    input:
        training_files,
    output:
        texts="results/{run}/ingest/texts.parquet",
        queries="results/{run}/ingest/queries.parquet",
        pairs="results/{run}/ingest/pairs.parquet",
        rejected="results/{run}/ingest/rejected.parquet",
    log:
        "logs/{run}/ingest.log",
    benchmark:
        "benchmarks/{run}/ingest.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=settings("ingest"),
        code=code("ingest"),
    script:
        "../scripts/ingest.py"


rule benchmark:
    input:
        lambda wildcards: list(
            PLAN.config(wildcards.run).evaluate.benchmarks[wildcards.benchmark].files().values()
        ),
    output:
        texts="results/{run}/ingest/{benchmark}/texts.parquet",
        queries="results/{run}/ingest/{benchmark}/queries.parquet",
        pairs="results/{run}/ingest/{benchmark}/pairs.parquet",
    log:
        "logs/{run}/ingest.{benchmark}.log",
    benchmark:
        "benchmarks/{run}/ingest.{benchmark}.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=settings("benchmark", "benchmark"),
        code=code("benchmark"),
    script:
        "../scripts/benchmark.py"
