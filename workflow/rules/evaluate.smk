def benchmark_vectors(wildcards):
    return [
        PLAN.path(Node(wildcards.run, "embed", (wildcards.model, wildcards.benchmark, part)))
        for part in PLAN.parts(wildcards.run)
    ]


def judged_runs(run):
    """{benchmark: {model: path of its run}}."""
    return {
        benchmark: {model: PLAN.path(Node(run, "evaluate", (benchmark, model))) for model in PLAN.models(run)}
        for benchmark in PLAN.benchmarks(run)
    }


def benchmark_tables(run):
    """{benchmark: {table: path}}."""
    return {
        benchmark: {
            table: PLAN.path(Node(run, "benchmark", (benchmark,)), f"{table}.parquet")
            for table in ("texts", "queries", "pairs")
        }
        for benchmark in PLAN.benchmarks(run)
    }


def flat(nested):
    return [path for inner in nested.values() for path in inner.values()]


rule evaluate:
    input:
        benchmark_vectors,
    output:
        "results/{run}/evaluate/{benchmark}/{model}.run.parquet",
    log:
        "logs/{run}/evaluate.{benchmark}.{model}.log",
    benchmark:
        "benchmarks/{run}/evaluate.{benchmark}.{model}.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=settings("evaluate", "benchmark", "model"),
        code=code("evaluate"),
    script:
        "../scripts/evaluate.py"


rule metrics:
    input:
        lambda wildcards: flat(judged_runs(wildcards.run)) + flat(benchmark_tables(wildcards.run)),
    output:
        "results/{run}/evaluate/metrics.parquet",
    log:
        "logs/{run}/metrics.log",
    benchmark:
        "benchmarks/{run}/metrics.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=settings("metrics"),
        runs=lambda wildcards: judged_runs(wildcards.run),
        benchmarks=lambda wildcards: benchmark_tables(wildcards.run),
        code=code("metrics"),
    script:
        "../scripts/metrics.py"
