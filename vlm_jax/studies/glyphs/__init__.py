"""The glyph suite: questions about real handwriting, in the families ocr, facts and scene."""
