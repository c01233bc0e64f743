"""Job of the rule config: the resolved config, beside the results."""

from job import start

start(snakemake)

import yaml

from retune.runtime import atomic

with atomic(snakemake.output[0]) as part:
    part.write_text(yaml.safe_dump(snakemake.params.settings["config"], sort_keys=False, allow_unicode=True))
