rule demo:
    output:
        train="results/{run}/raw/train.jsonl",
        queries="results/{run}/raw/test/queries.jsonl",
        corpus="results/{run}/raw/test/corpus.jsonl",
        qrels="results/{run}/raw/test/qrels/test.tsv",
    log:
        "logs/{run}/demo.log",
    benchmark:
        "benchmarks/{run}/demo.tsv"
    conda:
        ENVIRONMENT
    params:
        settings=WIRING.settings("demo"),
        code=code("demo"),
    script:
        "../scripts/demo.py"
