"""What a finished run says: result.json, report, plots, tables."""
