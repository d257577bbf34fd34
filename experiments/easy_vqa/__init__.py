"""easy-VQA: a public data set of coloured shapes, read by a source class outside the library."""
