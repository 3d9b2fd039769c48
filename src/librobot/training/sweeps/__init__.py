"""Many runs with one command: what a job of a sweep leaves behind, Optuna's study, pruning, the report."""
