"""Every setting, typed and frozen: a module a group. `pipeline.config` puts the groups together."""
