"""Every setting, typed and frozen, one module for each group. `pipeline.settings.config` joins the groups."""
