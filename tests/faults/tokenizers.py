"""Tokenizers that are damaged or hostile, and chat templates."""

import json

from faults.damage import MODEL, Fault, json_changed
from faults.models import linked

UNREAD = f"{MODEL}its tokenizer cannot be read: "
RUST = f"{UNREAD}tokenizer.json: "
FAILS = f"{MODEL}its tokenizer fails on a text "
CONFIG = f"{MODEL}tokenizer_config.json: "
LINK = "is a link out of its folder, to {root}/elsewhere; replace it by the file itself"
TEMPLATE = f"{CONFIG}chat_template must be text, or a list of objects with name and template"


def changed(root, part, **changes):
    """Change entries of a part of tokenizer.json."""
    file = root / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    (content[part] if part else content).update(changes)
    file.write_text(json.dumps(content))


def broken(part, message, **changes):
    return Fault(lambda root: changed(root, part, **changes), f"{RUST}{message} at line 1 column …")


def split(pattern):
    """Return the part of tokenizer.json that splits texts by a regular expression."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def configured(message, **changes):
    return Fault(lambda root: json_changed(root / "model" / "tokenizer_config.json", **changes), message)


def templates_linked(root):
    (root / "model" / "additional_chat_templates").mkdir()
    linked(root, "additional_chat_templates/tools.jinja")


FAULTS = {
    "tokenizer: a list": Fault(
        lambda root: (root / "model" / "tokenizer.json").write_text("[]"),
        f"{MODEL}tokenizer.json holds a list, must be a JSON object"),
    "tokenizer: null": Fault(
        lambda root: (root / "model" / "tokenizer.json").write_text("null"),
        f"{MODEL}tokenizer.json holds null, must be a JSON object"),
    "tokenizer: binary": Fault(
        lambda root: (root / "model" / "tokenizer.json").write_bytes(b"\xff\xfe"),
        f"{MODEL}tokenizer.json cannot be read as JSON ('utf-8' …)"),
    "tokenizer: a configuration that is a list": Fault(
        lambda root: (root / "model" / "tokenizer_config.json").write_text("[]"),
        f"{MODEL}tokenizer_config.json holds a list, must be a JSON object"),
    "tokenizer: special tokens that are a number": Fault(
        lambda root: (root / "model" / "special_tokens_map.json").write_text("3"),
        f"{MODEL}special_tokens_map.json holds a whole number, must be a JSON object"),
    "tokenizer: merges that are text": broken(
        "model", "data did not match any variant of untagged enum MergeType", merges="x"),
    "tokenizer: merges of unknown tokens": broken("model", "Token `zz` out of vocabulary", merges=[["zz", "qq"]]),
    "tokenizer: merges of three": broken("model", "Merges text file invalid at line 1", merges=["a b c"]),
    "tokenizer: an unknown model": broken(
        "model", "data did not match any variant of untagged enum ModelUntagged", type="Other"),
    "tokenizer: another model": broken("model", "invalid type: map, expected a sequence", type="Unigram"),
    "tokenizer: no vocabulary": broken("model", "Token `…` out of vocabulary", vocab={}),
    "tokenizer: a vocabulary with a negative id": broken(
        "model", "invalid value: integer `-1`, expected u32", vocab={"a": -1}),
    "tokenizer: a vocabulary that is text": broken(
        "model", "invalid type: string \"x\", expected a map", vocab="x"),
    "tokenizer: a model that is a number": broken(
        "", "data did not match any variant of untagged enum ModelUntagged", model=3),
    "tokenizer: an unknown pre-tokenizer": broken(
        "", "data did not match any variant of untagged enum PreTokenizerUntagged", pre_tokenizer={"type": "Other"}),
    "tokenizer: a regular expression that is none": broken(
        "", "Oniguruma error: end pattern with unmatched parenthesis", pre_tokenizer=split("(")),
    "tokenizer: a regular expression that gives up": Fault(
        lambda root: changed(root, "", pre_tokenizer=split(r"(([a-z ])+.)+[A-Z]([a-z ])+\x02")),
        f"{FAILS}(Onig: Regex search error: retry-limit-in-match over)"),
    "tokenizer: a regular expression that takes long": Fault(  # for long texts, hours; for this one, ten seconds
        lambda root: changed(root, "", pre_tokenizer=split(r"([^\n])*" * 4 + r"[^\n]?" * 3 + r"(\d\D\d\D)")),
        f"{MODEL}its tokenizer takes longer than 3 s for … characters; its regular expressions may be damaged"),
    "tokenizer: an unknown normalizer": broken(
        "", "data did not match any variant of untagged enum NormalizerUntagged", normalizer={"type": "Other"}),
    "tokenizer: a normalizer that panics at once": Fault(
        lambda root: changed(root, "", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        f"{UNREAD}Precompiled: Error(…)"),
    "tokenizer: a normalizer that panics on a text": Fault(
        lambda root: changed(root, "", normalizer={"type": "Prepend", "prepend": ""}),
        f"{FAILS}(index out of bounds: …)"),
    "tokenizer: an unknown decoder": broken(
        "", "data did not match any variant of untagged enum PyDecoderWrapper", decoder={"type": "Other"}),
    "tokenizer: a template with a token that is none": Fault(
        lambda root: changed(root, "", post_processor={
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}], "pair": [],
            "special_tokens": {}}),
        f"{FAILS}(no entry found for key)"),
    "tokenizer: tokens added by a number": Fault(
        lambda root: changed(root, "", added_tokens=3), f"{MODEL}tokenizer.json: added_tokens is 3, must be a list"),
    "tokenizer: a class that is a number": configured(
        f"{CONFIG}tokenizer_class is 3, must be text", tokenizer_class=3),
    "tokenizer: a length of text": configured(
        f"{CONFIG}model_max_length is \"x\", must be a number", model_max_length="x"),
    "tokenizer: an added token that is a number": configured(
        f"{UNREAD}TypeError Found a <class 'int'> in the saved `added_tokens_decoder`, …",
        added_tokens_decoder={"1": 3}),
    "tokenizer: a beginning that is a number": configured(
        f"{UNREAD}TypeError Special token bos_token has to be …", bos_token=3),
    "tokenizer: unknown words": configured(
        f"{FAILS}(WordPiece error: Missing [UNK] token from the vocabulary)", tokenizer_class="BertTokenizer"),
    "template: a number": configured(TEMPLATE, chat_template=3),
    "template: a list of numbers": configured(TEMPLATE, chat_template=[3]),
    "template: a name without a text": configured(TEMPLATE, chat_template=[{"name": "a"}]),
    "template: a path for a name": configured(
        f"{CONFIG}the chat template's name '../../x' is a path, must be a plain name",
        chat_template=[{"name": "../../x", "template": "t"}]),
    "template: an absolute path for a name": configured(
        f"{CONFIG}the chat template's name '/etc/x' is a path, must be a plain name",
        chat_template=[{"name": "default", "template": "t"}, {"name": "/etc/x", "template": "t"}]),
    "template: no text": Fault(
        lambda root: (root / "model" / "chat_template.jinja").write_bytes(b"\xff\xfe"), f"{UNREAD}'utf-8' codec …"),
    "template: a link out of the folder": Fault(
        lambda root: linked(root, "chat_template.jinja"), f"{MODEL}chat_template.jinja {LINK}"),
    "template: one of several is a link out of the folder": Fault(
        templates_linked, f"{MODEL}additional_chat_templates/tools.jinja {LINK}"),
    "tokenizer: a link out of the folder": Fault(
        lambda root: linked(root, "tokenizer.json"), f"{MODEL}tokenizer.json {LINK}"),
}
