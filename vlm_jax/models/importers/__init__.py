"""Weights between this project and the formats that people hold."""
