"""The tokenizer of Baichuan: the pieces that sentencepiece finds with the checkpoint's own tokenizer.model."""

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

PATTERNS = {(False, False): "none", (True, False): "bos", (False, True): "eos", (True, True): "bos_eos"}


class BaichuanTokenizer(SentencePieceBackend):
    """Named as the checkpoints name theirs. Spaces are treated as the model file says; no <s> in front by default."""

    def __init__(self, vocab_file, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=False,
                 add_eos_token=False, **kwargs):
        pattern = PATTERNS[add_bos_token, add_eos_token]
        super().__init__(**kwargs | {"legacy": True, "special_tokens_pattern": pattern}, vocab_file=vocab_file,
                         bos_token=bos_token, eos_token=eos_token, unk_token=unk_token, add_bos_token=add_bos_token,
                         add_eos_token=add_eos_token)

    def convert_tokens_to_string(self, tokens):
        """Join pieces to the text that they came from."""
        return self.sp_model.decode(tokens)
