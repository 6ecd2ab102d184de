"""Training, evaluation, checkpoints and reports. Knows nothing of Ray: it runs under torchrun or in one process too."""
