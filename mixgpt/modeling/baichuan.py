"""Baichuan (arXiv 2309.10305) from transformers' LLaMA modules: loads the published checkpoints without their code.

Unlike LLaMA, q, k and v come from one matrix W_pack, the 13B models use ALiBi (arXiv 2108.12409) instead of rotary
positions, and Baichuan 2 normalises the rows of its head. Importing this file registers them with the Auto classes.
"""

import json
import math
from dataclasses import field
from pathlib import Path

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

ROTARY = {4096: True, 5120: False}  # By the hidden sizes of the published models.
NORMALISED_HEAD = 125_696  # The vocabulary of Baichuan 2.

@strict
class BaichuanConfig(LlamaConfig):
    """The published fields; 13B models give their context length only as model_max_length."""

    model_type = "baichuan"

    architectures: list[str] | None = field(default_factory=lambda: ["BaichuanForCausalLM"])  # One of two classes.
    vocab_size: int = 64_000
    max_position_embeddings: int | None = None
    model_max_length: int | None = None
    pad_token_id: int | None = 0

    @property
    def rotary(self) -> bool:
        """Whether positions are rotary (7B), not ALiBi (13B)."""
        return ROTARY.get(self.hidden_size, self.max_position_embeddings is not None)


class BaichuanAttention(LlamaAttention):
    """LLaMA's attention with one matrix for q, k and v."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        del self.q_proj, self.k_proj, self.v_proj
        self.W_pack = torch.nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = self._modules.pop("o_proj")  # It must be listed after W_pack, in the order of execution.

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None,
                attention_mask: Tensor | None = None, cache: Cache | None = None,
                **kwargs: object) -> tuple[Tensor, Tensor | None]:
        B, T, C = hidden_states.shape
        query, key, value = (part.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, heads, T, head_dim)
                             for part in self.W_pack(hidden_states).split(C, dim=-1))
        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(B, T, C)), weights


class BaichuanModel(LlamaModel):
    """The decoder without its head."""

    config_class = BaichuanConfig

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = BaichuanAttention(config, index)
        if not config.rotary:
            del self.rotary_emb
            self.rotary_emb = lambda *_, **__: None
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, cache: Cache | None = None,
                inputs_embeds: Tensor | None = None, **kwargs: object) -> BaseModelOutputWithPast:
        if not self.config.rotary:
            source, dtype = input_ids if input_ids is not None else inputs_embeds, self.embed_tokens.weight.dtype
            # Scores get −slope · distance. Slopes are 2^(−8i/n), i = 1 … n, n the largest power of two up to the heads;
            # other heads take every other slope of 2n heads (arXiv 2108.12409, section 3 and its code).
            heads = self.config.num_attention_heads
            n = 2 ** math.floor(math.log2(heads))
            slopes = torch.tensor([2 ** (-8 * i / n) for i in range(1, n + 1)]
                                  + [2 ** (-4 * i / n) for i in range(1, 2 * (heads - n), 2)], device=source.device)
            seen = cache.get_seq_length() if cache is not None else 0
            position = torch.arange(seen + source.shape[1], device=source.device)
            # Distances, not positions: small numbers are exact in bfloat16, and left padding shifts nothing.
            distance = position[seen:, None] - position
            blocked = (distance < 0)[None, None]
            if attention_mask is not None:  # (B, keys), 0 for padding
                blocked = blocked | (attention_mask[:, None, None] == 0)
            bias = (-slopes[:, None, None] * distance).to(dtype)
            attention_mask = bias.masked_fill(blocked, torch.finfo(dtype).min)  # (1 or B, heads, queries, keys)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, cache=cache,
                               inputs_embeds=inputs_embeds, **kwargs)


class NormHead(torch.nn.Linear):
    """A head whose rows are normalised in the forward pass; the weight stays as stored (arXiv 2309.10305, 2.4)."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, torch.nn.functional.normalize(self.weight))


class BaichuanForCausalLM(LlamaForCausalLM):
    """The language model, named as in the configurations of Baichuan-13B and Baichuan 2."""

    config_class = BaichuanConfig

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.model = BaichuanModel(config)
        if config.vocab_size == NORMALISED_HEAD:
            self.lm_head = NormHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class BaiChuanForCausalLM(BaichuanForCausalLM):
    """The same, named as in the configuration of Baichuan-7B."""


class BaichuanTokenizer(SentencePieceBackend):
    """Tokenize as sentencepiece does with a checkpoint's own tokenizer.model; checkpoints use this class name."""

    def __init__(self, vocab_file: str, bos_token: str = "<s>", eos_token: str = "</s>", unk_token: str = "<unk>",
                 add_bos_token: bool = True, **kwargs: object) -> None:
        pattern = "bos" if add_bos_token else "none"
        super().__init__(**kwargs | {"legacy": True, "special_tokens_pattern": pattern}, vocab_file=vocab_file,
                         bos_token=bos_token, eos_token=eos_token, unk_token=unk_token, add_bos_token=add_bos_token)
        self.add_bos_token = add_bos_token

    def save_pretrained(self, save_directory: str | Path, *arguments: object, **options: object) -> tuple[str, ...]:
        """Save the files of the tokenizer; transformers leaves out whether it adds <s>."""
        files = super().save_pretrained(save_directory, *arguments, **options)
        file = Path(save_directory) / "tokenizer_config.json"
        content = {"add_bos_token": self.add_bos_token} | json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        return files

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces into the original text, without special tokens."""
        return self.sp_model.decode(tokens)


AutoConfig.register("baichuan", BaichuanConfig)
MODEL_FOR_CAUSAL_LM_MAPPING.register(BaichuanConfig, (BaichuanForCausalLM, BaiChuanForCausalLM))
AutoTokenizer.register(BaichuanConfig, BaichuanTokenizer)
