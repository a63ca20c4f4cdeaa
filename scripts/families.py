"""The families of golden_families.py: class of transformers, options, and other values that must move the logits."""

from dataclasses import dataclass, field


@dataclass
class Family:
    config: str  # class of transformers
    options: dict
    matters: dict = field(default_factory=dict)  # dotted option: another value, with which the logits differ
    louder: dict = field(default_factory=dict)  # part of a tensor's name: factor on its values
    model: str = ""  # where it is not CONFIG with ForCausalLM
    transposed: bool = False  # stacked experts are [in, out]
    untouched: dict = field(default_factory=dict)  # name: shape of tensors that the class leaves alone
    stacked: bool = False  # experts stored as one tensor, where `save_pretrained` would write them one by one
    old: bool = False  # config.json in the spelling of transformers 4, without `layer_types`


SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=None)
EXPERTS = dict(moe_intermediate_size=32, num_experts_per_tok=2)


def rope(kind="default", theta=100.0, **more):
    return {"rope_type": kind, "rope_theta": theta, **more}


# Of the 8 frequencies of 16 dimensions the first stay as they are, the last are divided, those between are blended.
YARN = dict(kind="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=8.0, beta_slow=0.5)
SHORT, LONG = [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], [1.0, 1.5, 2.5, 4.0, 6.0, 9.0]


def longrope(original):
    return dict(original_max_position_embeddings=original, partial_rotary_factor=0.75, rope_parameters=rope(
        "longrope", short_factor=SHORT, long_factor=LONG, partial_rotary_factor=0.75))


PHI3 = dict(SIZES, num_attention_heads=2, num_key_value_heads=1, sliding_window=10)
HYBRID = dict(layer_types=["linear_attention", "full_attention"], num_attention_heads=2, num_key_value_heads=1,
              head_dim=32, linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=16,
              linear_value_head_dim=16, linear_conv_kernel_dim=4)
HYBRID_MATTERS = {"rope_parameters.partial_rotary_factor": 0.5, "zero dt_bias": None, "zero A_log": None}
QUARTER = rope(partial_rotary_factor=0.25, mrope_section=[2, 1, 1], mrope_interleaved=True)
THIRDS = rope(mrope_section=[4, 2, 2], mrope_interleaved=True)
LATENT = dict(num_key_value_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
              n_routed_experts=8, n_shared_experts=1)
VISION = dict(vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32,
                                 patch_size=4, num_position_embeddings=4, deepstack_visual_indexes=[0]))
# A head that predicts the token after the next: one layer of full attention and what joins it to the model.
MTP = {f"mtp.{name}.weight": shape for name, shape in {
    "fc": (32, 64), "norm": (32,), "pre_fc_norm_embedding": (32,), "pre_fc_norm_hidden": (32,),
    "layers.0.input_layernorm": (32,), "layers.0.post_attention_layernorm": (32,),
    "layers.0.mlp.gate_proj": (64, 32), "layers.0.mlp.up_proj": (64, 32), "layers.0.mlp.down_proj": (32, 64),
    "layers.0.self_attn.q_proj": (128, 32), "layers.0.self_attn.k_proj": (32, 32),
    "layers.0.self_attn.v_proj": (32, 32), "layers.0.self_attn.o_proj": (32, 64),
    "layers.0.self_attn.q_norm": (32,), "layers.0.self_attn.k_norm": (32,)}.items()}
GEMMA4 = dict(head_dim=16, global_head_dim=32, num_global_key_value_heads=1, attention_k_eq_v=True,
              hidden_size_per_layer_input=0, sliding_window=5, final_logit_softcapping=10.0, pad_token_id=0,
              layer_types=["sliding_attention", "full_attention"], rope_parameters={
                  "sliding_attention": rope(), "full_attention": rope("proportional", partial_rotary_factor=0.25)})
GEMMA4_MATTERS = {"sliding_window": 6, "final_logit_softcapping": None, "zero layer_scalar": None,
                  "rope_parameters.full_attention.partial_rotary_factor": 0.5}
LLAMA4 = dict(intermediate_size=32, intermediate_size_mlp=64, head_dim=16, num_local_experts=4, num_experts_per_tok=1,
              moe_layers=[1], no_rope_layers=[1, 0])

FAMILIES = {
    "phi3": Family("Phi3Config", dict(PHI3, **longrope(32)), {
        "sliding_window": None, "rope_parameters.short_factor": LONG, "max_position_embeddings": 256}),
    "phi3_long": Family("Phi3Config", dict(PHI3, **longrope(16)), {
        "rope_parameters.long_factor": SHORT, "rope_parameters.rope_theta": 1e4}),
    "qwen2_windows": Family("Qwen2Config", dict(
        SIZES, num_hidden_layers=3, use_sliding_window=True, sliding_window=6, max_window_layers=1,
        rope_parameters=rope()), {"sliding_window": 7, "max_window_layers": 2, "use_sliding_window": False},
        old=True),
    "llama_yarn": Family("LlamaConfig", dict(SIZES, head_dim=16, rope_parameters=rope(**YARN)), {
        "rope_parameters.beta_slow": 1.0, "rope_parameters.factor": 5.0, "rope_parameters.attention_factor": 1.0,
        "rope_parameters.truncate": False}),
    "llama_dynamic": Family("LlamaConfig", dict(
        SIZES, max_position_embeddings=16, rope_parameters=rope("dynamic", factor=4.0)), {
        "rope_parameters.factor": 2.0, "max_position_embeddings": 17}),
    "qwen3_moe": Family("Qwen3MoeConfig", dict(
        SIZES, num_hidden_layers=3, head_dim=16, num_experts=4, norm_topk_prob=True, mlp_only_layers=[1],
        use_sliding_window=True, sliding_window=7, rope_parameters=rope(), **EXPERTS), {
        "norm_topk_prob": False, "num_experts_per_tok": 1, "sliding_window": 8}),
    "mixtral": Family("MixtralConfig", dict(
        SIZES | dict(intermediate_size=32), num_local_experts=4, num_experts_per_tok=2, sliding_window=7,
        rope_parameters=rope()), {"num_experts_per_tok": 3, "sliding_window": None}),
    "qwen2_moe": Family("Qwen2MoeConfig", dict(
        SIZES, num_hidden_layers=3, num_experts=4, norm_topk_prob=False, shared_expert_intermediate_size=64,
        decoder_sparse_step=2, use_sliding_window=True, sliding_window=6, max_window_layers=2,
        rope_parameters=rope(), **EXPERTS), {"norm_topk_prob": True, "sliding_window": 7, "max_window_layers": 3}),
    "glm4_moe": Family("Glm4MoeConfig", dict(
        SIZES, head_dim=16, attention_bias=True, use_qk_norm=True, n_routed_experts=8, n_group=4, topk_group=2,
        n_shared_experts=1, first_k_dense_replace=1, routed_scaling_factor=1.5, num_nextn_predict_layers=0,
        rope_parameters=rope(partial_rotary_factor=0.5), **EXPERTS), {
        "n_group": 2, "topk_group": 4, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "use_qk_norm": False,
        "rope_parameters.partial_rotary_factor": 1.0, "zero correction_bias": None}),
    "minimax_m2": Family("MiniMaxM2Config", dict(
        SIZES | dict(intermediate_size=32), head_dim=16, rotary_dim=8, scoring_func="sigmoid", num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters=rope(partial_rotary_factor=0.5)), {
        "rope_parameters.partial_rotary_factor": 1.0, "zero correction_bias": None}),
    "gpt_oss": Family("GptOssConfig", dict(
        SIZES | dict(intermediate_size=32), head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=5,
        rope_parameters=rope(**YARN, truncate=False)), {
        "sliding_window": 6, "rope_parameters.truncate": True, "rope_parameters.factor": 2.0, "zero sinks": None,
        "zero router.bias": None, "zero gate_up_proj_bias": None}, louder={"gate_up_proj": 3.0}, transposed=True),
    "gemma3": Family("Gemma3TextConfig", dict(
        SIZES, num_hidden_layers=3, head_dim=16, query_pre_attn_scalar=24, sliding_window=5,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"], rope_parameters={
            "sliding_attention": rope(), "full_attention": rope("linear", 1e4, factor=8.0)}), {
        "query_pre_attn_scalar": 16, "sliding_window": 6, "rope_parameters.full_attention.factor": 4.0,
        "rope_parameters.sliding_attention.rope_theta": 1e4}),
    "gemma2": Family("Gemma2Config", dict(
        SIZES, head_dim=16, query_pre_attn_scalar=24, sliding_window=5, final_logit_softcapping=10.0,
        attn_logit_softcapping=2.0, rope_parameters=rope()), {
        "query_pre_attn_scalar": 16, "sliding_window": 6, "final_logit_softcapping": None,
        "attn_logit_softcapping": None}),
    "qwen3_5": Family("Qwen3_5TextConfig", dict(
        SIZES | HYBRID, rope_parameters=QUARTER), HYBRID_MATTERS),
    "qwen3_5_moe": Family("Qwen3_5MoeTextConfig", dict(
        SIZES | HYBRID, num_experts=4, shared_expert_intermediate_size=32, rope_parameters=QUARTER, **EXPERTS), {
        **HYBRID_MATTERS, "zero shared_expert_gate": None}),
    "qwen3_5_wrapped": Family("Qwen3_5Config", dict(
        VISION, text_config=dict(SIZES | HYBRID, tie_word_embeddings=True, mtp_num_hidden_layers=1,
                                 rope_parameters=QUARTER)), {
        "zero A_log": None}, model="Qwen3_5ForConditionalGeneration", untouched=MTP),
    "qwen3_5_moe_wrapped": Family("Qwen3_5MoeConfig", dict(
        VISION, text_config=dict(SIZES | HYBRID, vocab_size=64, num_experts=4, shared_expert_intermediate_size=32,
                                 rope_parameters=QUARTER, **EXPERTS)), {
        "text_config.num_experts_per_tok": 3}, model="Qwen3_5MoeForConditionalGeneration", stacked=True),
    "qwen3_next": Family("Qwen3NextConfig", dict(
        SIZES | HYBRID, num_experts=4, shared_expert_intermediate_size=32, norm_topk_prob=True,
        rope_parameters=rope(partial_rotary_factor=0.25), **EXPERTS), {
        **HYBRID_MATTERS, "norm_topk_prob": False, "zero shared_expert_gate": None}),
    "deepseek_v3": Family("DeepseekV3Config", dict(
        SIZES | LATENT, q_lora_rank=32, n_group=4, topk_group=2, routed_scaling_factor=2.5, first_k_dense_replace=1,
        scoring_func="sigmoid", topk_method="noaux_tc", num_nextn_predict_layers=0, rope_parameters=rope(**YARN,
        mscale=1.0, mscale_all_dim=0.7), **EXPERTS), {
        "n_group": 2, "topk_group": 4, "norm_topk_prob": False, "routed_scaling_factor": 1.0,
        "rope_interleave": False,
        "rope_parameters.mscale": 0.7, "rope_parameters.mscale_all_dim": 1.0, "zero correction_bias": None}),
    "deepseek_v2": Family("DeepseekV2Config", dict(
        SIZES | LATENT, q_lora_rank=None, n_group=2, topk_group=1, topk_method="group_limited_greedy",
        scoring_func="softmax",
        routed_scaling_factor=1.5, first_k_dense_replace=1, num_experts_per_tok=3, moe_intermediate_size=32,
        rope_parameters=rope(**YARN, mscale=0.707, mscale_all_dim=0.707)), {
        "topk_method": "greedy", "topk_group": 2, "routed_scaling_factor": 1.0,
        "rope_parameters.mscale_all_dim": 0.5}),
    "glm4": Family("Glm4Config", dict(
        SIZES, head_dim=16, attention_bias=True, rope_parameters=rope(partial_rotary_factor=0.5)), {
        "rope_parameters.partial_rotary_factor": 1.0}),
    "olmo2": Family("Olmo2Config", dict(SIZES, rope_parameters=rope())),
    "olmo3": Family("Olmo3Config", dict(
        SIZES, layer_types=["sliding_attention", "full_attention"], sliding_window=6, rope_parameters={
            "sliding_attention": rope(), "full_attention": rope(**YARN)}), {
        "sliding_window": 7, "rope_parameters.full_attention.factor": 2.0}),
    "granite": Family("GraniteConfig", dict(
        SIZES, embedding_multiplier=3.0, residual_multiplier=0.7, logits_scaling=0.25, attention_multiplier=0.3,
        rope_parameters=rope()), {
        "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
        "attention_multiplier": 0.35}),
    "cohere": Family("CohereConfig", dict(SIZES, use_qk_norm=True, logit_scale=0.25, rope_parameters=rope()), {
        "logit_scale": 1.0, "use_qk_norm": False}),
    "cohere2": Family("Cohere2Config", dict(
        SIZES, logit_scale=0.25, rotary_pct=1.0, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"], rope_parameters=rope()), {"sliding_window": 6,
        "layer_types": ["full_attention", "full_attention"]}),
    "exaone4": Family("Exaone4Config", dict(
        SIZES, sliding_window=5, sliding_window_pattern=2, layer_types=["sliding_attention", "full_attention"],
        rope_parameters=rope()), {"sliding_window": 6, "layer_types": ["sliding_attention", "sliding_attention"]}),
    "seed_oss": Family("SeedOssConfig", dict(
        SIZES, head_dim=16, attention_bias=True, attention_out_bias=False, rope_parameters=rope()), {
        "zero bias": None}),
    "hunyuan_dense": Family("HunYuanDenseV1Config", dict(
        SIZES | dict(max_position_embeddings=32768), head_dim=16,
        rope_parameters=rope("dynamic", 1e4, factor=1.0, alpha=1000.0)), {"rope_parameters.alpha": 100.0}),
    "ernie4_5": Family("Ernie4_5Config", dict(SIZES, head_dim=16, use_bias=True, rope_parameters=rope()), {
        "zero bias": None}),
    "ernie4_5_moe": Family("Ernie4_5_MoeConfig", dict(
        SIZES, moe_intermediate_size=32, moe_k=2, moe_num_experts=4, moe_num_shared_experts=2,
        moe_layer_start_index=1,
        rope_parameters=rope()), {"zero correction_bias": None, "moe_k": 3}),
    "smollm3": Family("SmolLM3Config", dict(SIZES, no_rope_layers=[1, 0], rope_parameters=rope()), {
        "no_rope_layers": [1, 1]}),
    "ministral3": Family("Ministral3Config", dict(
        SIZES, head_dim=16, rope_parameters=rope(**YARN, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)), {
        "rope_parameters.factor": 2.0}),
    "ministral3_long": Family("Ministral3Config", dict(
        SIZES, head_dim=16, rope_parameters=rope(
            **YARN | dict(original_max_position_embeddings=8), mscale=1.0, mscale_all_dim=1.0,
            llama_4_scaling_beta=0.1)), {"rope_parameters.llama_4_scaling_beta": 0.0}),
    "qwen3_vl": Family("Qwen3VLConfig", dict(VISION, text_config=dict(SIZES, head_dim=16, rope_parameters=THIRDS)), {
        "text_config.rope_parameters.rope_theta": 1e4}, model="Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": Family("Qwen3VLMoeConfig", dict(
        VISION, text_config=dict(
            SIZES, head_dim=16, num_experts=4, mlp_only_layers=[0], rope_parameters=THIRDS, **EXPERTS)), {
        "text_config.num_experts_per_tok": 3}, model="Qwen3VLMoeForConditionalGeneration"),
    "gemma4": Family("Gemma4TextConfig", dict(
        SIZES | GEMMA4, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32), {
        **GEMMA4_MATTERS, "top_k_experts": 1, "zero per_expert_scale": None, "zero router.scale": None}),
    "gemma4_dense": Family("Gemma4TextConfig", SIZES | GEMMA4, GEMMA4_MATTERS),
    "glm4_moe_lite": Family("Glm4MoeLiteConfig", dict(
        SIZES | LATENT, q_lora_rank=32, n_group=4, topk_group=2, routed_scaling_factor=1.8,
        num_nextn_predict_layers=0,
        rope_parameters=rope(), **EXPERTS), {
        "n_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "zero correction_bias": None}),
    "mistral4": Family("Mistral4Config", dict(
        SIZES | LATENT | dict(qk_nope_head_dim=8), q_lora_rank=32, n_group=1, topk_group=1, first_k_dense_replace=1,
        rope_parameters=rope(**YARN, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1,
                             partial_rotary_factor=0.5), **EXPERTS), {
        "norm_topk_prob": False, "rope_parameters.factor": 2.0, "rope_parameters.mscale_all_dim": 0.5}),
    "llama4": Family("Llama4TextConfig", dict(
        SIZES | LLAMA4, attention_chunk_size=64, floor_scale=64, rope_parameters=rope()), {
        "use_qk_norm": False, "no_rope_layers": [1, 1]}, transposed=True),
    "llama4_long": Family("Llama4TextConfig", dict(
        SIZES | LLAMA4, attention_chunk_size=7, floor_scale=4, rope_parameters=rope()), {
        "attention_chunk_size": 8, "floor_scale": 5, "attn_scale": 0.2, "attn_temperature_tuning": False},
        transposed=True),
}
