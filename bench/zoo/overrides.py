"""What single architectures need beside the general sizes: data, read by ``config`` and ``inputs``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: In a table below: leave this field at the config's own default.
DEFAULT = object()
#: In a table below: the tiny config of the part, which the default config leaves out.
PART = object()

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPE_3D = {**_ROPE, "mrope_section": [2, 3, 3]}
_WINDOWS = {
    "embed_dim": 48,
    "depths": (2, 2),
    "num_heads": (3, 6),
    "window_size": 4,
    "image_size": 64,
    "patch_size": 4,
}

#: Config settings by model type, of nested configs too.
CONFIGS: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "big_bird": {"block_size": 4, "num_random_blocks": 1},
    "bigbird_pegasus": {"block_size": 4, "num_random_blocks": 1},
    "blip-2": {"image_token_index": 100},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt_local_encoder": {"hidden_size_global": 64},
    "chameleon": {"vocabulary_map": {"<image>": 100, "IMGIMGAZ": 101}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 96,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
            "hidden_size": 64,
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [64, 64]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dinat": {
        "embed_dim": 64,
        "depths": (1, 1),
        "num_heads": (2, 4),
        "kernel_size": 3,
        "dilations": [[1], [1]],
    },
    "donut-swin": _WINDOWS,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "efficientnet": {
        "in_channels": DEFAULT,
        "out_channels": DEFAULT,
        "width_coefficient": 0.5,
        "depth_coefficient": 0.2,
        "hidden_dim": 640,
        "image_size": 64,
    },
    "emu3": {"vocabulary_map": {"<|extra_200|>": 100, "<image>": 101, "<|visual token 000000|>": 102}},
    "emu3_vqgan": {"base_channels": 32, "codebook_size": 64},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 100},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "intermediate_size": 96,
    },
    "gemma4": {"vision_config": PART},
    "gemma4_unified": {"vision_config": PART},
    "gemma4_unified_vision": {"output_proj_dims": 64},
    "glm5_next_text": {"index_topk": 4, "index_kpool": 2, "num_key_value_heads": 4},
    "glm4v_moe_text": {
        "rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "downsample_rate": "2/4",
        "deepstack_layer_map": [[-2, 0]],
        "spatial_target_layers": [0, 1, 0, 1],
        "image_grid_pinpoints": [[32, 32]],
    },
    "hgnet_v2": dict.fromkeys(
        (
            "stem_channels",
            "stage_in_channels",
            "stage_mid_channels",
            "stage_out_channels",
            "hidden_sizes",
            "embedding_size",
        ),
        DEFAULT,
    ),
    "hunyuan_v1_dense": {"rope_parameters": _ROPE, "head_dim": 16},
    "hunyuan_v1_moe": {"rope_parameters": _ROPE, "head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16, "rope_parameters": _ROPE_3D},
    "instructblip": {"image_token_index": 100},
    "instructblipvideo": {"video_token_index": 100},
    "internvl_vision": {"image_size": [32, 32], "patch_size": [8, 8]},
    "layoutlm": {"max_2d_position_embeddings": 32},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8, "max_2d_position_embeddings": 32},
    "led": {"attention_window": [4, 4]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48, "max_2d_position_embeddings": 32},
    "llama4_vision_model": {"intermediate_size": 256, "vision_output_dim": 64},
    "llava_next": {"image_grid_pinpoints": [[32, 32]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 32]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 32]]},
    "longformer": {"attention_window": [4, 4]},
    "lxmert": {"visual_feat_dim": 64},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minicpm_ocr": {"image_token_id": 100},
    "minicpmv4_6": {"image_token_id": 100},
    "minicpmv4_7": {"image_token_id": 100},
    "ministral": {"rope_parameters": _ROPE, "head_dim": 16},
    "mobilevitv2": {"base_attn_unit_dims": DEFAULT, "image_size": 128},
    "mistral_large4_text": {"kv_source_layers": DEFAULT},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "mpnet": {"relative_attention_num_buckets": 32},
    "nemotron_h_omni": {"image_token_id": 100},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "nystromformer": {"segment_means_seq_len": 16, "num_landmarks": 4},
    "qianfan_ocr_vision": {"image_size": [32, 32], "patch_size": [8, 8]},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "radio": {"video_temporal_patch_size": 2},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [32, 32],
        "attention_head_size": 16,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "num_hashes": 1,
        "hash_seed": 0,
    },
    "sam_vision_model": {"global_attn_indexes": [0, 1]},
    "shieldgemma2": {"yes_token_index": 20, "no_token_index": 21},
    "step3p5": {"sliding_window": 8},
    "swin": _WINDOWS,
    "swinv2": {**_WINDOWS, "pretrained_window_sizes": (0, 0)},
    "textnet": {"hidden_sizes": DEFAULT, "stem_out_channels": DEFAULT, "image_size": [64, 64]},
    "udop": {"relative_attention_num_buckets": 32},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [64, 64]},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    **{
        f"{name}_text": {"rope_parameters": _ROPE_3D}
        for name in (
            "glm4v",
            "glm46v",
            "glm_ocr",
            "glmga",
            "paddleocr_vl",
            "qwen2_vl",
            "qwen2_5_vl",
            "qwen2_5_omni",
        )
    },
}

#: Encoders that the causal LM mapping lists too: there they run as decoders.
_ENCODERS = (
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "reformer",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
#: Further settings for a model type under one task.
BY_TASK: dict[tuple[str, str], dict[str, Any]] = {
    **{("causal_lm", name): {"is_decoder": True} for name in _ENCODERS},
    **{("seq_cls", name): {"decoder_start_token_id": 0} for name in ("t5", "mt5", "umt5")},
    **{("qa", name): {"decoder_start_token_id": 0} for name in ("t5", "mt5", "umt5")},
}

#: Model types made of two others: the encoder's and the decoder's.
PAIRS: dict[str, tuple[str, str]] = {
    "encoder-decoder": ("bert", "bert"),
    "vision-encoder-decoder": ("vit", "bert"),
}
PAIR_DECODER: dict[str, Any] = {"is_decoder": True, "add_cross_attention": True}

#: Model types whose call names the decoder's ids though their config does not say that they have a decoder.
DECODERS = ("diffusion_gemma",)
#: Float inputs that a text model's call needs besides ids: their shapes by name. ``frames`` are eight for
#: each id.
FLOATS: dict[str, dict[str, tuple[Any, ...]]] = {
    "bros": {"bbox": ("batch", "length", 4)},
    "lxmert": {"visual_feats": ("batch", 4, 64), "visual_pos": ("batch", 4, 4)},
    "udop": {"bbox": ("batch", "length", 4)},
    "voxtral_realtime": {"input_features": ("batch", 16, "frames")},
}

_GRID = [[x, y] for y in range(4) for x in range(4)]
#: Pixels in a layout of a model's own, and what says how they are laid out, for so many samples: of floating
#: point inputs the shape (a tuple), of others the values (a list).
PIXELS: dict[str, Callable[[int], dict[str, Any]]] = {
    "deepseek_vl_hybrid": lambda n: {"pixel_values": (n, 3, 32, 32), "high_res_pixel_values": (n, 3, 32, 32)},
    "diffusion_gemma": lambda n: {"pixel_values": (n, 16, 192), "image_position_ids": [_GRID] * n},
    "fuyu": lambda n: {"pixel_values": (n, 16, 192)},
    "gemma4": lambda n: {"pixel_values": (n, 16, 192), "image_position_ids": [_GRID] * n},
    "gemma4_unified": lambda n: {"pixel_values": (n, 16, 1728), "image_position_ids": [_GRID] * n},
    "granite_docling": lambda n: {"pixel_values": (n, 1, 3, 32, 32), "pixel_attention_mask": [[True]] * n},
    "lfm2_vl": lambda n: {
        "pixel_values": (n, 16, 192),
        "spatial_shapes": [[4, 4]] * n,
        "pixel_attention_mask": [[1] * 16] * n,
    },
    "mllama": lambda n: {
        "pixel_values": (n, 1, 4, 3, 32, 32),
        "aspect_ratio_ids": [[1]] * n,
        "aspect_ratio_mask": [[[1] * 4]] * n,
    },
    **dict.fromkeys(
        ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"),
        lambda n: {"pixel_values": (1, 3, 8, 128 * n), "target_sizes": [[4, 4]] * n},
    ),
    "nemotron_h_omni": lambda n: {"pixel_values": (16 * n, 192), "image_grid_hw": [[4, 4]] * n},
    **dict.fromkeys(
        ("muse_glimmer", "muse_spark"),
        lambda n: {"pixel_values": (16 * n, 384), "image_grid_thw": [[1, 4, 4]] * n},
    ),
    "udop": lambda n: {"pixel_values": (n, 3, 32, 32), "bbox": [[[0.2, 0.2, 0.6, 0.6]] * 6] * n},
    "video_llama_3": lambda n: {
        "pixel_values": (16 * n, 192),
        "image_grid_thw": [[1, 4, 4]] * n,
        "image_merge_sizes": [2] * n,
    },
}
