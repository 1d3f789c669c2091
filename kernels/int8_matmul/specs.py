"""Products of real models, (M, K, N), shared by tests and benchmarks."""

SPECS = {
  'minilm_qkv_128': (128, 384, 384),
  'minilm_mlp_up_128': (128, 384, 1536),
  'minilm_mlp_down_128': (128, 1536, 384),
  'stories260k_q_64': (64, 64, 64),
  'stories260k_up_64': (64, 64, 172),
  'lenet5_head_64': (64, 120, 84),
  'llama1b_q_decode': (1, 2048, 2048),
  'llama1b_kv_decode': (1, 2048, 512),
  'llama1b_up_decode': (1, 2048, 8192),
  'llama1b_down_decode': (1, 8192, 2048),
  'llama7b_q_decode': (1, 4096, 4096),
  'llama7b_up_decode': (1, 4096, 11008),
  'llama7b_q_prefill_256': (256, 4096, 4096),
}
