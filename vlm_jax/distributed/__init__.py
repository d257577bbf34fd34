"""Several devices as one: where arrays live, and several processes as one run."""
