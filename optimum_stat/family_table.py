"""What transformers calls the parts of a block, and what names and shapes do not tell about some families.

With `families`, which reads it, the only file that knows model names. A family whose parts have names that stand here needs no
entry; one line in `FAMILIES` says that it has been tested, and what else there is to know about it.
"""

from __future__ import annotations

from dataclasses import dataclass

QUERY_KEY_VALUE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
)
"""Three linears, side by side in the attention module."""
FUSED = ("c_attn", "qkv_proj", "query_key_value", "Wqkv", "in_proj")
"""One linear that makes all three; how its rows are ordered only the family's entry tells."""
ATTENTION_OUT = ("o_proj", "out_proj", "c_proj", "dense", "out_lin", "Wo", "o")
ATTENTION_OUT_BESIDE = "output.dense"
"""Where it stands beside the attention module instead of in it."""
CROSS_ATTENTION = ("encoder_attn", "EncDecAttention", "crossattention")
"""An attention of this name makes its keys and values of what another list of blocks, the encoder, returns."""
OF_POSITIONS = ("pos_key_proj", "pos_query_proj", "pos_proj", "pos_q_proj")
"""Linears in the attention module that make keys and queries out of relative positions."""
PER_HEAD = ("q_norm.weight", "k_norm.weight", "q_bias", "v_bias", "sinks")
"""Parameters of the attention module that hold an equal share for each head, unless all heads share one."""
NORMS_OVER_HEADS = ("q_norm.weight", "k_norm.weight")
"""Those that scale what has been divided by its root mean square; one-dimensional and of all heads, by that of all heads."""
NEURONS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("lin1",), "lin2"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
    (("ffn",), "ffn_output"),
    (("Wi",), "Wo"),
    (("wi",), "wo"),
    (("wi_0", "wi_1"), "wo"),
    (("intermediate_dense",), "output_dense"),
    (("weights_in",), "weights_out"),
)
"""The linears that make neurons, of a gate and what it gates stacked in one or in two, and the one that reads them."""
EXPERTS = "experts"
EXPERTS_UP = ("gate_up_proj", "up_proj")
EXPERTS_DOWN = "down_proj"
"""Parameters [experts, out, in], or [experts, in, out], of the module of that name."""
EXPERTS_OF_A_TOKEN = "num_experts_per_tok"
EXPERT_WIDTHS = ("intermediate_dim", "intermediate_size", "expert_dim")
"""Integers of it that say how many neurons an expert has."""
EXPERT_COUNT = "num_experts"
"""How many there are, in their module and in the router."""
ROUTERS = ("gate", "router")
"""What chooses a token's experts, beside them; its weight has a row for each."""
NORM_BEFORE_ATTENTION = (
    "input_layernorm",
    "attention_layernorm",
    "attn_norm",
    "ln_1",
    "ln_attn",
    "self_attn_layer_norm",
    "layernorm_before",
    "layer_norm1",
    "norm1",
    "layer_norm",
)
NORM_BEFORE_CROSS = ("encoder_attn_layer_norm", "layer_norm")
NORM_BEFORE_NEURONS = (
    "pre_feedforward_layernorm",
    "feedforward_layernorm",
    "mlp_norm",
    "ln_2",
    "ln_mlp",
    "final_layer_norm",
    "post_attention_layernorm",
    "layernorm_after",
    "layer_norm2",
    "norm2",
    "layer_norm",
)
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads")
KEY_VALUE_COUNTS = ("num_key_value_heads", "num_kv_heads")
HEADS_PER_KEY_VALUE = "num_key_value_groups"
HEAD_WIDTHS = ("all_head_size", "split_size", "dim", "inner_dim")
"""Integers of the attention module, or of one around it, that say how many heads there are, or how wide they are together."""
LAYER_INDEX = ("layer_idx", "layer_id")
"""Integers of a block's modules that say which block it is."""
HEAD_WIDTH = ("head_dim", "attention_head_size", "key_value_proj_dim")
"""How wide one head is, in the attention module."""


@dataclass(frozen=True)
class Family:
    """What names and shapes do not tell."""

    causal: bool | str | None = None
    """Whether tokens see only what stands before them; None: the attention module says so; a name: those blocks' tokens do
    that stand below a module of this name."""
    fused: str = ""
    """The rows of a fused query, key, value: "stacked" (all queries, all keys, all values), or "by head" (one key/value head's
    queries, key and value together)."""
    per_layer_config: tuple[str, str, str] | None = None
    """The config's names for (query heads, key/value heads, neurons), where transformers plans a cache from them, layer by layer;
    "": it has none, or more than one a layer."""
    config_reads: tuple[str, ...] = ()
    """Numbers of query heads that the attention's forward reads from its config."""
    bias_by_head: tuple[str, ...] = ()
    """Arguments of the attention module with a share for each of the dense model's heads, made once for all blocks."""
    bias_handed_on: tuple[str, str, str, str] | None = None
    """Where the first block makes a bias by head and returns it for the next: the attention's argument that takes it, its method
    that makes it, the embedding that this looks up in, and the flag that it is there."""
    norm_first: bool | str = "do_layer_norm_before"
    """Whether the norms stand before attention and neurons, not behind, or the config's name for that, if it has it."""
    interleaved: bool = False
    """Whether rotary embeddings turn neighbouring dimensions, not those that stand half a head apart."""
    reads_padding: bool = False
    """Whether a text is filled up to the longest that the model takes, and what fills it is read like the text: the last place
    stands for the whole."""
    refused: tuple[str, str] | None = None
    """(attribute of the config, why): a model that has it set cannot be pruned."""


_LAYERS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
_HEADS = ("num_attention_heads", "", "")
_ENCODER = Family(causal=False)
_DECODER = Family(per_layer_config=_LAYERS)
_MIXTURE = Family(per_layer_config=("num_attention_heads", "num_key_value_heads", ""))
FAMILIES: dict[str, Family] = {
    "albert": _ENCODER,
    "apertus": _DECODER,
    "bart": Family(norm_first=False),
    "bert": Family(),
    "bloom": Family(causal=True, fused="by head", bias_by_head=("alibi",), per_layer_config=_HEADS),
    "clip": Family(causal="text_model"),
    "clip_text_model": Family(causal=True),
    "clip_vision_model": _ENCODER,
    "cohere": Family(per_layer_config=_LAYERS, interleaved=True),
    "deberta": Family(causal=False, fused="by head", refused=("talking_head", "its attention mixes the heads' probabilities")),
    "deberta-v2": _ENCODER,
    "dinov2": _ENCODER,
    "distilbert": _ENCODER,
    "electra": Family(),
    "falcon": Family(
        fused="by head",
        bias_by_head=("alibi", "attention_mask"),
        per_layer_config=("num_key_value_heads", "", ""),  # the keys in its cache are repeated for every query head
    ),
    "gemma": _DECODER,
    "gemma2": _DECODER,
    "gemma3_text": _DECODER,
    "glm": Family(per_layer_config=_LAYERS, interleaved=True),
    "gpt2": Family(causal=True, fused="stacked", per_layer_config=("num_attention_heads", "", "n_inner")),
    "gpt_neox": Family(fused="by head", per_layer_config=("num_attention_heads", "", "intermediate_size")),
    "gpt_oss": _MIXTURE,
    "granite": _DECODER,
    "llama": _DECODER,
    "mistral": _DECODER,
    "mixtral": _MIXTURE,
    "modernbert": Family(causal=False, fused="stacked"),
    "mpnet": Family(causal=False, bias_by_head=("position_bias",)),
    "nemotron": _DECODER,
    "olmo2": _DECODER,
    "opt": Family(per_layer_config=("num_attention_heads", "", "ffn_dim")),
    "phi": _DECODER,
    "phi3": Family(fused="stacked", per_layer_config=_LAYERS, config_reads=("num_attention_heads",)),
    "qwen2": _DECODER,
    "qwen2_moe": _MIXTURE,
    "qwen3": _DECODER,
    "qwen3_moe": _MIXTURE,
    "roberta": Family(),
    "siglip": Family(causal=False, reads_padding=True),
    "siglip_vision_model": _ENCODER,
    "smollm3": _DECODER,
    "starcoder2": _DECODER,
    "t5": Family(bias_handed_on=("position_bias", "compute_bias", "relative_attention_bias", "has_relative_attention_bias")),
    "vit": _ENCODER,
    "wav2vec2": Family(causal=False, norm_first="do_stable_layer_norm"),
    "whisper": Family(),
}
TASK_OF_HEAD = {
    "WhisperForConditionalGeneration": "automatic-speech-recognition",
    "Wav2Vec2ForSequenceClassification": "audio-classification",
    "CLIPModel": "zero-shot-image-classification",
    "SiglipModel": "zero-shot-image-classification",
    "CausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "ImageClassification": "image-classification",
    "AudioClassification": "audio-classification",
    "ForCTC": "automatic-speech-recognition",
    "ConditionalGeneration": "text2text-generation",
}
"""What stands in the class name of a model with a head, and the Hub's name for what that head does."""
