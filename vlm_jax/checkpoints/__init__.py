"""What lies on disk: published weights, big_vision's files, and a run's own checkpoints."""
