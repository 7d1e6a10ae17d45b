"""Fields of Megatron-Core's TransformerConfig that ``actor.transformer`` may set.

config.json alone defines the function of the model. A field that changes it trains another model than the engine serves
and the export describes, and no check of a run notices: log-prob pass and training pass agree. A field can therefore be
set only if it is listed here. All others are refused, those of later versions of Megatron-Core as well, until they are
classified: :data:`REFUSED` lists the known ones, so that a test finds a field that is in neither list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FREE = frozenset(
    {
        # Initial values, which the weights of the model replace, and the device on which they are made.
        *("embedding_init_method_std", "init_method_std", "perform_initialization", "use_cpu_initialization"),
        *("use_te_rng_tracker", "config_logger_dir", "barrier_with_L1_time", "moe_per_layer_logging"),
        # Distribution of the layers over pipeline stages, and the schedule.
        *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
        *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout"),
        *("batch_p2p_comm", "batch_p2p_sync", "deallocate_pipeline_outputs", "microbatch_group_size_per_vp_stage"),
        *("overlap_p2p_comm", "overlap_p2p_comm_warmup_flush", "pipeline_model_parallel_comm_backend"),
        *("use_ring_exchange_p2p", "variable_seq_lengths"),
        # Communication of tensor and context parallelism.
        *("async_tensor_model_parallel_allreduce", "clone_scatter_output_in_embedding", "cp_comm_type"),
        *("hierarchical_context_parallel_sizes", "symmetric_ar_type", "tp_comm_atomic_ag", "tp_comm_atomic_rs"),
        *("tp_comm_bootstrap_backend", "tp_comm_bulk_dgrad", "tp_comm_bulk_wgrad", "tp_comm_overlap"),
        *("tp_comm_overlap_ag", "tp_comm_overlap_disable_fc1", "tp_comm_overlap_disable_qkv", "tp_comm_overlap_rs"),
        *("tp_comm_overlap_rs_dgrad", "tp_comm_split_ag", "tp_comm_split_rs"),
        # Kernels: the same function with other rounding.
        *("apply_rope_fusion", "attention_backend", "batch_invariant_mode", "bias_activation_fusion"),
        *("bias_dropout_fusion", "cross_entropy_fusion_impl", "cross_entropy_loss_fusion", "deterministic_mode"),
        *("flash_attention_version", "fused_residual_rmsnorm", "fused_single_qkv_rope"),
        *("gradient_accumulation_fusion", "masked_softmax_fusion", "memory_efficient_layer_norm"),
        *("persist_layer_norm", "transformer_impl", "use_te_activation_func"),
        # Precision.
        *("activation_func_fp8_input_store", "attention_softmax_in_fp32", "disable_bf16_reduced_precision_matmul"),
        *("disable_parameter_transpose_cache", "fp32_residual_connection", "fp8_amax_compute_algo"),
        *("fp8_amax_history_len", "fp8_dot_product_attention", "fp8_interval", "fp8_margin"),
        *("fp8_multi_head_attention", "fp8_wgrad", "tp_only_amax_red"),
        # Activation memory.
        *("activation_offload_fraction", "cpu_offloading", "cpu_offloading_activations"),
        *("cpu_offloading_double_buffering", "cpu_offloading_num_layers", "cpu_offloading_retain_pinned_cpu_buffers"),
        *("cpu_offloading_weights", "distribute_saved_activations", "fine_grained_activation_offloading"),
        *("fine_grained_offloading_max_inflight_offloads", "min_offloaded_tensor_size", "moe_layer_recompute"),
        *("num_microbatches_with_partial_activation_checkpoints", "offload_modules", "recompute_method"),
        *("recompute_modules", "recompute_num_layers"),
        # Dispatch to the experts and their kernels.
        *("high_priority_a2a_comm_stream", "moe_deepep_num_sms", "moe_enable_deepep", "moe_flex_dispatcher_backend"),
        *("moe_flex_dispatcher_num_sms", "moe_grouped_gemm", "moe_hybridep_num_sms", "moe_permute_fusion"),
        *("moe_permute_fusion_into_hybridep", "moe_router_dtype", "moe_router_fusion", "moe_router_padding_for_fp8"),
        *("moe_router_padding_for_quantization", "moe_token_dispatcher_type"),
        # Auxiliary losses of the routers, which change the gradient but not the function (actor/router_losses.py).
        *("moe_aux_loss_coeff", "moe_router_load_balancing_type", "moe_z_loss_coeff"),
    }
)
"""Fields that leave the function of the model as it is, apart from rounding."""

VALUES: Mapping[str, tuple[Any, ...]] = {
    # The others route by other scores (sinkhorn, quantile_balancing), or balance sequences, which a packed micro-batch
    # does not tell apart (seq_aux_loss).
    "moe_router_load_balancing_type": ("aux_loss", "global_aux_loss", "none"),
    "transformer_impl": ("local", "transformer_engine"),
}
"""Values of the fields in :data:`FREE` that also have values with another function."""

_COEFFICIENTS = ("moe_aux_loss_coeff", "moe_z_loss_coeff")

REFUSED = frozenset(
    {
        # Another function.
        *("activation_func_clamp_value", "apply_residual_connection_post_layernorm", "attention_output_gate"),
        *("experimental_attention_variant", "glu_linear_offset", "heterogeneous_block_specs", "is_hybrid_model"),
        *(
            "moe_apply_probs_on_input",
            "moe_enable_routing_replay",
            "moe_latent_size",
            "moe_pad_expert_input_to_capacity",
        ),
        *("moe_router_bias_update_rate", "moe_router_force_load_balancing", "moe_router_topk_limited_devices"),
        *("moe_shared_expert_gate", "moe_shared_expert_overlap", "moe_token_drop_policy", "moe_token_dropping"),
        *("mrope_section", "mtp_loss_scaling_factor", "mtp_standalone", "qk_clip", "qk_clip_alpha"),
        *("qk_clip_threshold", "qk_l2_norm", "use_fused_weighted_squared_relu", "window_attn_skip_freq"),
        *("dsa_indexer_head_dim", "dsa_indexer_loss_coeff", "dsa_indexer_n_heads", "dsa_indexer_topk"),
        *("dsa_indexer_use_sparse_loss", "linear_attention_freq", "linear_conv_kernel_dim", "linear_key_head_dim"),
        *("linear_num_key_heads", "linear_num_value_heads", "linear_value_head_dim", "mamba_head_dim"),
        *("mamba_num_groups", "mamba_num_heads", "mamba_state_dim", "use_mamba_mem_eff_path"),
        # Weights in another precision or under other names than the conversion expects.
        *("fp4", "fp4_param", "fp4_quantizer_factory", "fp4_recipe", "fp8_param", "fp8_quantizer_factory"),
        *("hetereogenous_dist_checkpoint", "init_model_with_meta_device", "kitchen_attention_backend"),
        *("moe_extended_tp", "moe_use_legacy_grouped_gemm", "quant_recipe", "use_kitchen", "use_kitchen_attention"),
        *("autocast_dtype", "enable_autocast"),
        # Need micro-batches of one length, a forward step of their own, or Megatron-Core's output layer.
        *("cuda_graph_impl", "cuda_graph_retain_backward_graph", "cuda_graph_scope", "cuda_graph_use_single_mempool"),
        *("cuda_graph_warmup_steps", "defer_embedding_wgrad_compute", "delay_wgrad_compute", "enable_cuda_graph"),
        *("ep_overlap_early_attn_memory_release", "external_cuda_graph", "hybrid_context_parallel"),
        *("max_seqlen_per_dp_cp_rank", "overlap_moe_expert_parallel_comm", "wgrad_deferral_limit"),
        # Inference, and internals.
        *("_cpu_offloading_context", "flash_decode", "inference_fuse_tp_communication", "inference_rng_tracker"),
        *("inference_sampling_seed", "log_max_attention_logit", "mlp_chunks_for_prefill", "test_mode"),
        *("use_inference_optimized_layers",),
        # New after 0.16.1, in the same order.
        *("dsa_indexer_k_norm_epsilon", "dsa_indexer_k_norm_fp32", "dsa_indexer_rope_interleaved"),
        *("dsa_indexer_rotate_activation", "dsa_indexer_scoring_relu", "dsa_indexer_skip_topk_offset"),
        *("dsa_indexer_topk_freq", "dsa_kernel_backend", "mamba_training_ssm_states_dtype"),
        *("moe_expert_rank_capacity_factor", "moe_mlp_glu_interleave_size", "moe_router_force_biased"),
        *("moe_router_quantile_balancing_ema", "moe_shared_expert_glu_interleave_size", "mtp_detach_heads"),
        *("mtp_hybrid_override_pattern", "mtp_use_repeated_layer", "mup_attn_scale_power", "mup_base_head_dim"),
        *("mup_base_hidden_size", "mup_embedding_mult", "mup_output_mult", "mup_width_mult", "use_mup"),
        *("expert_gtp_weight_remat_size", "expert_tensor_parallel_num_weight_shards", "fp8_output_proj"),
        *("gtp_weight_remat_size", "moe_single_grouped_bias", "moe_single_grouped_weight"),
        *("tensor_parallel_num_weight_shards", "use_grouped_gemm_for_dense_mlp"),
        *("use_grouped_gemm_for_shared_expert", "use_transformer_engine_op_fuser"),
        *("cuda_graph_modules", "delay_offload_until_cuda_graph", "delta_offload_bytes_across_pp_ranks"),
        *("mlp_chunks_for_training", "moe_hybridep_num_blocks_permute", "moe_hybridep_num_blocks_unpermute"),
        *("moe_hybridep_num_sms_preprocessing", "moe_hybridep_pad_uneven_dispatch_inputs"),
        *("moe_ncclep_static_shape", "moe_ncclep_zero_copy", "moe_pad_experts_for_cuda_graph_inference"),
        *("moe_paged_stash", "moe_paged_stash_buffer_size_factor_cpu", "moe_paged_stash_buffer_size_factor_cuda"),
        *("moe_paged_stash_page_size", "overlap_dispatch_backward_with_experts_wgrad"),
        *("inference_cuda_graph_scope", "inference_disable_triton_nvls_kernels", "inference_grouped_gemm_backend"),
        *("inference_moe_disable_fused_quant_kernels", "inference_moe_token_dispatcher_type"),
        *("nccl_all_reduce_for_prefill",),
    }
)
"""Known fields of Megatron-Core 0.16.1 to 0.19.2 that are refused, beside those that follow from model and actor."""


def field_problem(name: str, value: Any) -> str | None:
    """Returns why ``actor.transformer`` must not set a field, or must not set it to this value; None if it may.

    Args:
        name: Field of the installed TransformerConfig, in the list or not.
        value: Its value in the configuration.
    """
    if name not in FREE:
        return (
            f"actor.transformer.{name} = {value!r}: cannot be set here; config.json defines the function of the model, "
            "and this field is not known to leave it unchanged"
        )
    if name in VALUES and value not in VALUES[name]:
        return f"actor.transformer.{name} = {value!r}: must be one of {', '.join(VALUES[name])}"
    if name in _COEFFICIENTS and (
        isinstance(value, list) or (isinstance(value, int | float) and not 0 <= value < 1e30)
    ):
        return f"actor.transformer.{name} = {value!r}: must be one number from 0"
    return None
