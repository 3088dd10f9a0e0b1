"""Ray around `pipeline`: trainings on Ray Train, the scan on Ray Tune, jobs, and the command line."""
