"""Tiny sizes for config fields, by the field's name."""

from __future__ import annotations

import re
from typing import Any, TypeGuard

WIDTH, INNER, HEADS, GROUPS, HEAD, LAYERS, VOCABULARY, POSITIONS = 64, 96, 4, 2, 16, 2, 128, 128
#: Special tokens that do not fit the small vocabulary get ids from here on.
SPECIAL = 100

#: Field names (white space between them) and the size that they are reduced to.
_NAMES: tuple[tuple[int, str], ...] = (
    (
        WIDTH,
        """hidden_size d_model n_embd embed_dim embedding_size dim emb_dim word_embed_proj_dim out_hidden_size
        projection_dim output_hidden_size vision_hidden_size backbone_hidden_size input_embedding_size
        output_embedding_size projector_hidden_size projection_hidden_size classifier_proj_size embedding_dim
        decoder_hidden_size image_text_hidden_size lru_width cross_attention_hidden_size encoder_hidden_size
        text_hidden_size mm_hidden_size vision_embed_dim audio_hidden_size output_dim out_dim d_latents
        pooler_hidden_size pooler_output_size prediction_head_size language_hidden_size token_embedding_size
        fusion_hidden_size hidden_size_per_layer adapter_hidden_size vision_output_dim text_embed_dim
        merger_hidden_size connector_hidden_size speech_hidden_size""",
    ),
    (
        INNER,
        """intermediate_size ffn_dim d_ff decoder_ffn_dim encoder_ffn_dim n_inner dim_ff dff ffn_hidden_size
        d_inner mlp_dim feed_forward_size intermediate_size_mlp dense_intermediate_size
        speech_encoder_intermediate_size shared_intermediate_size block_ff_dim ff_dim
        feed_forward_hidden_size""",
    ),
    (
        HEADS,
        """num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads
        speech_encoder_attention_heads swa_num_attention_heads index_n_heads t2u_encoder_attention_heads
        t2u_decoder_attention_heads num_self_attention_heads num_cross_attention_heads linear_num_heads
        resampler_n_heads resampler_heads num_attention_heads_vision""",
    ),
    (
        GROUPS,
        """num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups
        num_global_key_value_heads""",
    ),
    (
        LAYERS,
        """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
        num_encoder_layers speech_encoder_layers t2u_encoder_layers t2u_decoder_layers num_blocks depth
        num_self_attends_per_block layers resampler_depth num_layers_per_stack n_encoder_layer
        n_decoder_layer encoder_num_layers num_hidden_layers_vision vision_layers""",
    ),
    (
        HEAD,
        """head_dim d_kv kv_channels swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim
        d_head dim_head attention_head_size global_head_dim v_head_dim qk_nope_head_dim index_head_dim
        resampler_head_dim resampler_dim_head qk_rope_head_dim""",
    ),
    (
        POSITIONS,
        """max_position_embeddings n_positions n_ctx max_seq_len context_length max_source_positions
        max_target_positions model_max_length max_length max_encoder_position_embeddings
        max_decoder_position_embeddings seq_length max_sequence_length t2u_max_position_embeddings
        mamba_d_ssm attention_hidden_size""",
    ),
    (
        32,
        """moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        expert_ffn_hidden_size moe_shared_expert_intermediate_size expert_intermediate_size qk_head_dim
        image_size input_size img_size""",
    ),
    (
        16,
        """kv_lora_rank q_lora_rank o_lora_rank mamba_d_state state_size ssm_state_size mamba_d_head
        mamba_head_dim mamba_headdim adapter_rank router_hidden_size gated_norm_rank block_multiple_of""",
    ),
    (
        8,
        """rotary_dim mamba_n_heads mamba_num_heads mamba_chunk_size chunk_size patch_size sliding_window
        sliding_window_size attention_window_size window_attention_size attention_chunk_size
        local_attention""",
    ),
    (
        4,
        """time_step_rank mamba_dt_rank linear_num_value_heads num_experts n_routed_experts num_local_experts
        moe_num_experts index_topk moe_topk_group""",
    ),
    (
        2,
        """linear_num_key_heads num_experts_per_tok moe_k moe_topk num_experts_per_token top_k_experts
        expert_top_k zero_expert_num""",
    ),
    (
        1,
        """n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts
        first_k_dense_replace num_nextn_predict_layers cross_layer_interval""",
    ),
)
_OTHERS: dict[str, int] = {
    "num_query_tokens": 4,
    "num_latents": 8,
    "latent_query_num": 4,
    "entity_emb_size": 32,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "num_landmarks": 4,
    "num_mel_bins": 16,
    "feature_projection_input_dim": 16,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
    "xvector_output_dim": 32,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "image_seq_length": 16,
    "num_image_tokens": 16,
    "mm_tokens_per_image": 4,
    "canvas_length": 16,
    "num_codevectors_per_group": 16,
    "hidden_dim": 96,
    "entity_vocab_size": 64,
    "num_labels": 5,
    "relative_attention_num_buckets": 8,
    "head_ratio": 2,
    "num_hash_buckets": 64,
    "prompt_mid_dim": 32,
    "d_rel": 8,
    "rel_extent": 32,
    "hc_lowrank": 16,
    "global_block_size": 4,
    "local_radius": 3,
    "embedding_rank": 16,
    "prompt_length": 8,
    "expert_capacity": 64,
    "num_position_embeddings": 64,
    "qformer_num_query": 4,
    "image_embed_dim": 64,
}
#: The size of each field that has one.
SIZES: dict[str, int] = {**{name: size for size, names in _NAMES for name in names.split()}, **_OTHERS}
#: Fields that count layers, the first that a config has being the main one.
DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_blocks",
)
#: For other integers: a name's pattern, the least value that is reduced, and the size.
_PATTERNS: tuple[tuple[str, int, int], ...] = (
    (r"intermediate|ffn_dim|mlp_dim", 256, INNER),
    (r"(hidden_size|embed_dim|_dim)$", 256, WIDTH),
    (r"num_(hidden_)?layers$|_layers$", 4, LAYERS),
    (r"_heads$", 4, HEADS),
)
#: Lists with a number of blocks for each stage.
_STAGES = (
    "depths",
    "n_attn_blocks",
    "num_block_repeats",
    "stage_num_blocks",
    "stage_numb_of_layers",
    "depth",
)


def is_int(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def size(name: str, value: int) -> int | None:
    """The tiny size of a field, None where its own is small enough or its name says nothing."""
    if "vocab_size" in name and name not in SIZES:
        return VOCABULARY if value > VOCABULARY else None
    if name in SIZES:
        return SIZES[name] if value > SIZES[name] else None
    for pattern, least, tiny in _PATTERNS:
        if re.search(pattern, name):
            return tiny if value > least else None
    return None


def stages(name: str, value: list[Any] | tuple[Any, ...]) -> Any | None:
    """The tiny counterpart of a list of sizes for each stage, None where the list is left as it is."""
    if not value or not all(map(is_int, value)):
        return None
    if name in _STAGES:
        return type(value)([1] * len(value))
    widths = re.search(r"hidden|dim|channel|width|size", name)
    if max(value) < 64 or not widths or re.search(r"kernel|stride|patch|window|_pos_|shape", name):
        return None
    factor = 128 / max(value)
    return type(value)([max(16, round(v * factor / 16) * 16) if v > 3 else v for v in value])
