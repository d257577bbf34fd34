"""The rows of the built-in compressors (`compress.contract.Compressor`)."""

from functools import partial

from vlm_jax.compress.contract import Compressor, all_patches, function_at, inner_width, without_mlp
from vlm_jax.compress.sizes import (
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
from vlm_jax.ops.grid_shapes import square_tokens

ROWS: dict[str, Compressor] = {
    "none": Compressor(
        function_at("pooling.no_weights"), function_at("pooling.keep_all"),
        pooling.all_tokens, pooling.no_cost, partial(pooling.defaults, "none"),
        reads_places=False,
    ),
    "blind": Compressor(
        function_at("pooling.no_weights"), function_at("pooling.drop_all"),
        pooling.no_tokens, pooling.no_cost, partial(pooling.defaults, "blind"),
        reads_places=False,
    ),
    "pool": Compressor(
        function_at("pooling.no_weights"), function_at("pooling.pool"),
        pooling.pool_tokens, pooling.pool_cost, partial(pooling.defaults, "pool")
    ),
    "resampler": Compressor(
        function_at("querying.init_resampler"), function_at("querying.resampler"),
        querying.resampler_tokens, querying.resampler_cost,
        partial(querying.defaults, "resampler"), elastic="prefix",
    ),
    "tokenpacker": Compressor(
        function_at("local.init_tokenpacker"), function_at("local.tokenpacker"),
        local.cell_tokens, local.tokenpacker_cost,
        partial(local.defaults, "tokenpacker"), frozenset({"tokens", "taps"}), local.tapped_layers,
    ),
    "quecc": Compressor(
        function_at("local.init_quecc"), function_at("local.quecc"),
        local.cell_tokens, local.quecc_cost, partial(local.defaults, "quecc"),
        frozenset({"tokens", "taps", "question_vector"}), local.tapped_layers,
    ),
    "m3": Compressor(
        function_at("pooling.no_weights"), function_at("pooling.m3"),
        pooling.cell_tokens, pooling.m3_cost, partial(pooling.defaults, "m3"),
        frozenset({"tokens", "project"}), elastic="ladder",
    ),
    "pixel_shuffle": Compressor(
        function_at("pooling.init_pixel_shuffle"), function_at("pooling.pixel_shuffle"),
        pooling.shuffle_tokens, pooling.no_cost,
        partial(pooling.defaults, "pixel_shuffle"), output_width=pooling.shuffled_width,
    ),
    "idefics3": Compressor(
        function_at("pooling.no_weights"), function_at("pooling.shuffle"),
        pooling.shuffle_tokens, pooling.no_cost,
        partial(pooling.defaults, "idefics3"), output_width=pooling.shuffled_width, projector="linear",
    ),
    "ldpv2": Compressor(
        function_at("convolving.init_ldpv2"), function_at("convolving.ldpv2"),
        pooling.pool_tokens, convolving.ldpv2_cost,
        partial(pooling.defaults, "ldpv2"), frozenset({"tokens", "project"}), elastic="ladder",
    ),
    "c_abstractor": Compressor(
        function_at("convolving.init_abstractor"), function_at("convolving.abstractor"),
        square_tokens, convolving.abstractor_cost,
        partial(convolving.abstractor_defaults, "c_abstractor"), output_width=inner_width, projector="mlp_silu",
        elastic="ladder",
    ),
    "perceiver": Compressor(
        function_at("perceiver.init_perceiver"), function_at("perceiver.perceiver"),
        querying.resampler_tokens, perceiver.perceiver_cost,
        partial(perceiver.defaults, "perceiver"), reads_places=False,
        problem=without_mlp,
    ),
    "qformer": Compressor(
        function_at("qformer.init_qformer"), function_at("qformer.qformer"),
        querying.resampler_tokens, qformer.qformer_cost,
        partial(qformer.defaults, "qformer"), output_width=inner_width, projector="linear", reads_places=False,
        problem=without_mlp,
    ),
    "qformer_question": Compressor(
        function_at("qformer.init_with_question"), function_at("qformer.qformer"),
        querying.resampler_tokens, qformer.with_question_cost,
        partial(qformer.defaults, "qformer_question"), frozenset({"tokens", "question_tokens"}),
        output_width=inner_width, projector="linear", reads_places=False,
        problem=without_mlp,
    ),
    "mqt": Compressor(
        function_at("mqt.init_mqt"), function_at("mqt.mqt"),
        mqt.mqt_tokens, mqt.mqt_cost, partial(mqt.defaults, "mqt"), projector="linear",
        problem=mqt.problem, elastic="prefix",
    ),
    "token_learner": Compressor(
        function_at("token_learner.init_token_learner"), function_at("token_learner.token_learner"),
        token_learner.learner_tokens,
        token_learner.token_learner_cost, partial(token_learner.defaults, "token_learner"), elastic="prefix",
        reads_places=False,
    ),
    "token_learner_conv": Compressor(
        function_at("token_learner.init_token_learner_conv"), function_at("token_learner.token_learner_conv"),
        token_learner.learner_tokens,
        token_learner.token_learner_conv_cost, partial(token_learner.defaults, "token_learner_conv"),
    ),
    "llava_mini": Compressor(
        function_at("llava_mini.init_llava_mini"), function_at("llava_mini.llava_mini"),
        square_tokens, llava_mini.llava_mini_cost,
        partial(llava_mini.defaults, "llava_mini"), frozenset({"tokens", "question_tokens", "project"}),
        for_decoder=llava_mini.for_decoder, problem=llava_mini.problem,
    ),
    "vision_zip": Compressor(
        function_at("pooling.no_weights"), function_at("selection.vision_zip"),
        selection.zip_tokens, selection.zip_cost,
        partial(pooling.defaults, "vision_zip"), frozenset({"tokens", "keys", "salience", "class_token"}),
        attention=selection.attention_of_tokens, class_token_optional=True,
    ),
    "prumerge": Compressor(
        function_at("pooling.no_weights"), function_at("selection.prumerge"),
        selection.prumerge_tokens, selection.prumerge_cost,
        partial(pooling.defaults, "prumerge"), frozenset({"tokens", "keys", "salience"}),
        attention=selection.attention_of_last,
    ),
    "prumerge_plus": Compressor(
        function_at("pooling.no_weights"), function_at("selection.prumerge_plus"),
        selection.prumerge_plus_tokens, selection.prumerge_cost,
        partial(pooling.defaults, "prumerge_plus"), frozenset({"tokens", "keys", "salience"}),
        attention=selection.attention_of_last,
    ),
    "divprune": Compressor(
        function_at("pooling.no_weights"), function_at("selection.divprune"),
        selection.zip_tokens, selection.divprune_cost,
        partial(pooling.defaults, "divprune"), frozenset({"tokens", "project"}), elastic="ladder", reads_places=False,
    ),
    "fastv": Compressor(
        function_at("pooling.no_weights"), function_at("pooling.keep_all"),
        language_side.fewer_tokens, language_side.all_projected,
        partial(language_side.defaults, "fastv", language_side.FASTV_LAYERS), entering=all_patches,
        stages=language_side.fastv_stages, scores_tokens=True, elastic="ladder", reads_places=False,
        for_decoder=language_side.for_decoder,
    ),
    "pyramiddrop": Compressor(
        function_at("pooling.no_weights"), function_at("pooling.keep_all"),
        language_side.fewer_tokens, language_side.all_projected,
        partial(language_side.defaults, "pyramiddrop", language_side.PYRAMID_STAGES), entering=all_patches,
        stages=language_side.pyramid_stages, scores_tokens=True, elastic="ladder", reads_places=False,
        for_decoder=language_side.for_decoder,
    ),
    "victor": Compressor(
        function_at("language_side.init_learned"), function_at("language_side.append_learned"),
        language_side.fewer_tokens,
        language_side.all_projected, partial(language_side.defaults, "victor", language_side.VICTOR_LAYERS),
        frozenset({"tokens", "project"}), entering=language_side.with_learned, stages=language_side.victor_stages,
        reads_places=False,
        for_decoder=language_side.for_decoder,
    ),
    "voco": Compressor(
        function_at("language_side.init_learned"), function_at("language_side.append_learned"),
        language_side.fewer_tokens,
        language_side.all_projected, partial(language_side.defaults, "voco", 1), frozenset({"tokens", "project"}),
        entering=language_side.with_learned, segments=language_side.voco_segments, reads_places=False,
    ),
}  # fmt: skip
