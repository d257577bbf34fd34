"""Segments of a row that are no conversation (`ops.masks`)."""

SHARED = -1  # the segment that all segments of a row attend to
HIDDEN = -2  # a segment that only itself and the shared one attend to
