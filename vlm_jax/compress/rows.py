"""The rows of the built-in compressors (`compress.contract.Compressor`)."""

from functools import partial

from vlm_jax.compress import (
    convolving,
    language_side,
    llava_mini,
    local,
    mqt,
    perceiver,
    pooling,
    qformer,
    querying,
    selection,
    token_learner,
)
from vlm_jax.compress.contract import Compressor, all_patches, inner_width, without_mlp
from vlm_jax.ops.grid import square_tokens

ROWS: dict[str, Compressor] = {
    "none": Compressor(
        pooling.no_weights, pooling.keep_all, pooling.all_tokens, pooling.no_cost, partial(pooling.defaults, "none"),
        reads_places=False,
    ),
    "blind": Compressor(
        pooling.no_weights, pooling.drop_all, pooling.no_tokens, pooling.no_cost, partial(pooling.defaults, "blind"),
        reads_places=False,
    ),
    "pool": Compressor(
        pooling.no_weights, pooling.pool, pooling.pool_tokens, pooling.pool_cost, partial(pooling.defaults, "pool")
    ),
    "resampler": Compressor(
        querying.init_resampler, querying.resampler, querying.resampler_tokens, querying.resampler_cost,
        partial(querying.defaults, "resampler"), elastic="prefix",
    ),
    "tokenpacker": Compressor(
        local.init_tokenpacker, local.tokenpacker, local.cell_tokens, local.tokenpacker_cost,
        partial(local.defaults, "tokenpacker"), frozenset({"tokens", "taps"}), local.tapped_layers,
    ),
    "quecc": Compressor(
        local.init_quecc, local.quecc, local.cell_tokens, local.quecc_cost, partial(local.defaults, "quecc"),
        frozenset({"tokens", "taps", "question_vector"}), local.tapped_layers,
    ),
    "m3": Compressor(
        pooling.no_weights, pooling.m3, pooling.cell_tokens, pooling.m3_cost, partial(pooling.defaults, "m3"),
        frozenset({"tokens", "project"}), elastic="ladder",
    ),
    "pixel_shuffle": Compressor(
        pooling.init_pixel_shuffle, pooling.pixel_shuffle, pooling.shuffle_tokens, pooling.no_cost,
        partial(pooling.defaults, "pixel_shuffle"), output_width=pooling.shuffled_width,
    ),
    "idefics3": Compressor(
        pooling.no_weights, pooling.shuffle, pooling.shuffle_tokens, pooling.no_cost,
        partial(pooling.defaults, "idefics3"), output_width=pooling.shuffled_width, projector="linear",
    ),
    "ldpv2": Compressor(
        convolving.init_ldpv2, convolving.ldpv2, pooling.pool_tokens, convolving.ldpv2_cost,
        partial(pooling.defaults, "ldpv2"), frozenset({"tokens", "project"}), elastic="ladder",
    ),
    "c_abstractor": Compressor(
        convolving.init_abstractor, convolving.abstractor, square_tokens, convolving.abstractor_cost,
        partial(convolving.abstractor_defaults, "c_abstractor"), output_width=inner_width, projector="mlp_silu",
        elastic="ladder",
    ),
    "perceiver": Compressor(
        perceiver.init_perceiver, perceiver.perceiver, querying.resampler_tokens, perceiver.perceiver_cost,
        partial(perceiver.defaults, "perceiver"), reads_places=False,
        problem=without_mlp,
    ),
    "qformer": Compressor(
        qformer.init_qformer, qformer.qformer, querying.resampler_tokens, qformer.qformer_cost,
        partial(qformer.defaults, "qformer"), output_width=inner_width, projector="linear", reads_places=False,
        problem=without_mlp,
    ),
    "qformer_question": Compressor(
        qformer.init_with_question, qformer.qformer, querying.resampler_tokens, qformer.with_question_cost,
        partial(qformer.defaults, "qformer_question"), frozenset({"tokens", "question_tokens"}),
        output_width=inner_width, projector="linear", reads_places=False,
        problem=without_mlp,
    ),
    "mqt": Compressor(
        mqt.init_mqt, mqt.mqt, mqt.mqt_tokens, mqt.mqt_cost, partial(mqt.defaults, "mqt"), projector="linear",
        problem=mqt.problem, elastic="prefix",
    ),
    "token_learner": Compressor(
        token_learner.init_token_learner, token_learner.token_learner, token_learner.learner_tokens,
        token_learner.token_learner_cost, partial(token_learner.defaults, "token_learner"), elastic="prefix",
        reads_places=False,
    ),
    "token_learner_conv": Compressor(
        token_learner.init_token_learner_conv, token_learner.token_learner_conv, token_learner.learner_tokens,
        token_learner.token_learner_conv_cost, partial(token_learner.defaults, "token_learner_conv"),
    ),
    "llava_mini": Compressor(
        llava_mini.init_llava_mini, llava_mini.llava_mini, square_tokens, llava_mini.llava_mini_cost,
        partial(llava_mini.defaults, "llava_mini"), frozenset({"tokens", "question_tokens", "project"}),
        for_decoder=llava_mini.for_decoder, problem=llava_mini.problem,
    ),
    "vision_zip": Compressor(
        pooling.no_weights, selection.vision_zip, selection.zip_tokens, selection.zip_cost,
        partial(pooling.defaults, "vision_zip"), frozenset({"tokens", "keys", "salience", "class_token"}),
        attention=selection.attention_of_tokens,
    ),
    "prumerge": Compressor(
        pooling.no_weights, selection.prumerge, selection.prumerge_tokens, selection.prumerge_cost,
        partial(pooling.defaults, "prumerge"), frozenset({"tokens", "keys", "salience"}),
        attention=selection.attention_of_last,
    ),
    "prumerge_plus": Compressor(
        pooling.no_weights, selection.prumerge_plus, selection.prumerge_plus_tokens, selection.prumerge_cost,
        partial(pooling.defaults, "prumerge_plus"), frozenset({"tokens", "keys", "salience"}),
        attention=selection.attention_of_last,
    ),
    "divprune": Compressor(
        pooling.no_weights, selection.divprune, selection.zip_tokens, selection.divprune_cost,
        partial(pooling.defaults, "divprune"), frozenset({"tokens", "project"}), elastic="ladder", reads_places=False,
    ),
    "fastv": Compressor(
        pooling.no_weights, pooling.keep_all, language_side.fewer_tokens, language_side.all_projected,
        partial(language_side.defaults, "fastv", language_side.FASTV_LAYERS), entering=all_patches,
        stages=language_side.fastv_stages, scores_tokens=True, elastic="ladder", reads_places=False,
        for_decoder=language_side.for_decoder,
    ),
    "pyramiddrop": Compressor(
        pooling.no_weights, pooling.keep_all, language_side.fewer_tokens, language_side.all_projected,
        partial(language_side.defaults, "pyramiddrop", language_side.PYRAMID_STAGES), entering=all_patches,
        stages=language_side.pyramid_stages, scores_tokens=True, elastic="ladder", reads_places=False,
        for_decoder=language_side.for_decoder,
    ),
    "victor": Compressor(
        language_side.init_learned, language_side.append_learned, language_side.fewer_tokens,
        language_side.all_projected, partial(language_side.defaults, "victor", language_side.VICTOR_LAYERS),
        frozenset({"tokens", "project"}), entering=language_side.with_learned, stages=language_side.victor_stages,
        reads_places=False,
        for_decoder=language_side.for_decoder,
    ),
    "voco": Compressor(
        language_side.init_learned, language_side.append_learned, language_side.fewer_tokens,
        language_side.all_projected, partial(language_side.defaults, "voco", 1), frozenset({"tokens", "project"}),
        entering=language_side.with_learned, segments=language_side.voco_segments, reads_places=False,
    ),
}  # fmt: skip
