"""Job of the rule config: the resolved config, beside the results."""

from retune.runtime import start_job

start_job(snakemake.log[0], snakemake.threads)

import yaml

from retune.runtime import atomic

with atomic(snakemake.output[0]) as part:
    part.write_text(yaml.safe_dump(snakemake.params.settings["config"], sort_keys=False, allow_unicode=True))
