"""FLOPs of the layers of `compress.layers`: their matrix products, a multiply-add as two, and nothing else."""

from vlm_jax.compress.contract import Count


def linear_flops(rows: Count, inputs: int, outputs: int) -> float:
    return 2.0 * rows * inputs * outputs


def mlp_flops(rows: Count, inputs: int, hidden: int, outputs: int) -> float:
    return linear_flops(rows, inputs, hidden) + linear_flops(rows, hidden, outputs)


def attention_flops(
    queries: Count, keys: Count, pairs: Count, width: int, outputs: int, query_inputs: int = 0, key_inputs: int = 0
) -> float:
    """`pairs` is the number of scored (query, key) pairs: queries * keys, or fewer for local attention."""
    project_in = linear_flops(queries, query_inputs or width, width)
    project_in += 2 * linear_flops(keys, key_inputs or width, width)
    return project_in + 2 * linear_flops(pairs, width, 1) + linear_flops(queries, width, outputs)


def depthwise_flops(cells: int, width: int) -> float:
    return 18.0 * cells * width
