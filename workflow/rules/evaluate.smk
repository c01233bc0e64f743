localrules:
    trec,
    gate,


rule evaluate:
    input:
        WIRING.benchmark_vectors,
    output:
        "results/{run}/evaluate/{benchmark}/{judged}.run.parquet",
    log:
        "logs/{run}/evaluate.{benchmark}.{judged}.log",
    benchmark:
        "benchmarks/{run}/evaluate.{benchmark}.{judged}.tsv"
    conda:
        ENVIRONMENT
    threads: SHARE
    params:
        settings=WIRING.settings("evaluate", "benchmark", "judged"),
        code=code("evaluate"),
    script:
        "../scripts/evaluate.py"


rule metrics:
    input:
        WIRING.judged_files,
    output:
        "results/{run}/evaluate/metrics.parquet",
    log:
        "logs/{run}/metrics.log",
    benchmark:
        "benchmarks/{run}/metrics.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=WIRING.settings("metrics"),
        runs=WIRING.judged_runs,
        benchmarks=WIRING.benchmark_tables,
        code=code("metrics"),
    script:
        "../scripts/metrics.py"


rule trec:
    input:
        run=WIRING.made("evaluate", "", "benchmark", "judged"),
        queries=WIRING.made("benchmark", "queries.parquet", "benchmark"),
        texts=WIRING.made("benchmark", "texts.parquet", "benchmark"),
    output:
        "results/{run}/evaluate/{benchmark}/{judged}.trec",
    log:
        "logs/{run}/trec.{benchmark}.{judged}.log",
    conda:
        ENVIRONMENT
    params:
        code=code("trec"),
    script:
        "../scripts/trec.py"


rule gate:
    input:
        metrics=WIRING.made("metrics"),
        # The report is written first: who reads that the gate failed wants to see why.
        report=WIRING.gated_report,
    output:
        "results/{run}/evaluate/gate.txt",
    log:
        "logs/{run}/gate.log",
    conda:
        ENVIRONMENT
    params:
        settings=WIRING.settings("gate"),
        code=code("gate"),
    script:
        "../scripts/gate.py"
