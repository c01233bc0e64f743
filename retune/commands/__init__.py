"""Commands: one stage on plain files, flags in, the same stage functions as the workflow's."""
