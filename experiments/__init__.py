"""Studies: one folder each, with the command that made its rows and figures. `launch` runs a grid."""
