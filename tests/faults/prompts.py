"""Arguments that generate.py refuses."""

from faults.damage import MODEL, Fault, config_changed, json_changed, nothing, weights_changed

UNSET = "must not be empty; is a variable of the shell unset?"
GREEDY = "must be 0 (greedy) or at least 1e-06"


def refused(options, message, damage=nothing):
    return Fault(damage, message, "{root}/model import --device cpu " + options, "generate")


def shrunk(root):
    """Leave fewer rows of embeddings than the tokenizer has tokens."""
    weights_changed(root, lambda state: state.update(
        {"model.embed_tokens.weight": state["model.embed_tokens.weight"][:99].clone()}))
    config_changed(root, vocab_size=99)


def silent(root):
    """Let the tokenizer give no tokens: nothing is put in front, and nothing is known."""
    json_changed(root / "model" / "tokenizer.json", post_processor=None, pre_tokenizer=None,
                 model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[])


FAULTS = {
    "a temperature below all": refused("--temperature 1e-45", f"--temperature 1e-45: {GREEDY}"),
    "a temperature that is negative": refused("--temperature=-0.5", f"--temperature -0.5: {GREEDY}"),
    "a temperature that is no number": refused("--temperature nan", f"--temperature nan: {GREEDY}"),
    "a temperature beyond all numbers": refused("--temperature 1e400", f"--temperature inf: {GREEDY}"),
    "a seed of a prompt that is negative": refused(
        "--seed=-1", f"--seed -1: must be at least 0 and at most {2**64 - 1}"),
    "a seed of a prompt of 65 bits": refused(
        f"--seed {2**64}", f"--seed {2**64}: must be at least 0 and at most {2**64 - 1}"),
    "no new tokens": refused("--max_new_tokens 0", "--max_new_tokens 0: must be at least 1"),
    "new tokens beyond all numbers": refused(
        f"--max_new_tokens {10**20}", f"--max_new_tokens {10**20}: must be at most {2**31 - 1}"),
    "new tokens beyond the model": refused(
        "--max_new_tokens 128", "--max_new_tokens 128: the model's limit is 128 tokens, with the prompt"),
    "an empty --dense": refused("--dense=", f'--dense "": {UNSET}'),
    "an empty --device of a prompt": refused("--device=", f'--device "": {UNSET}'),
    "a dense model that is not there": refused("--dense ./gone", "--dense ./gone: no such file or folder"),
    "a prompt of bytes that are no text": Fault(
        nothing, "prompt: character 5 is not text; give the prompt in UTF-8", "{root}/model naïv\udcff", "generate"),
    "a prompt with half of a character": Fault(
        nothing, "prompt: character 1 is not text; give the prompt in UTF-8", "{root}/model \ud83d", "generate"),
    "a prompt beyond the vocabulary": refused(
        "", f"{MODEL}its tokenizer gives token …, but its vocabulary has 99", shrunk),
    "a prompt that has no tokens": refused(
        "", "prompt: the model's tokenizer gives no token for it; give another one", silent),
    "logits that are not finite": refused(
        "", f"{MODEL}its logits contain NaN or inf; try --dtype float32",
        lambda root: weights_changed(root, lambda state: state["model.norm.weight"].fill_(3e38))),
}
