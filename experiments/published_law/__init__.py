"""The published scores as a study: data, the command that refits them, figures, findings."""
