"""Every setting, typed and frozen: a module a group. `pipeline.settings.config` puts the groups together."""
