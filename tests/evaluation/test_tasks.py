"""Run tasks of lm-eval from local files, and check their scores against scores computed by hand."""

import json
import math
import re
import sys
from types import SimpleNamespace

import lm_eval
import pytest
import torch
from conftest import CPU, record_of, run_together, saved_tensors, slow_but
from test_streamed_lm import pair_by_hand, text_by_hand
from transformers import AutoModelForCausalLM

import mixgpt
from mixgpt.checkpoints import load
from mixgpt.common.errors import InputError
from mixgpt.common.runtime import DEFAULT_SEQLEN, position_limit
from mixgpt.evaluation import tasks

QUESTIONS = [{"question": f"what is {word}?", "choices": choices, "label": number % len(choices)}
             for number, (word, choices) in enumerate([
                 ("a list", ["mutable", "a number", "nothing of that kind at all"]), ("a class", ["a type", "é"]),
                 ("import", ["a statement", "an operator", "a name", "it"]), ("None", ["a value", "a keyword, too"]),
                 ("a tuple", ["fixed", "changing", "ü ü ü"]), ("self", ["the instance", "a module"]),
                 ("yield", ["an expression", "a loop"]), ("lambda", ["a function", "a list of names", "x"])])]
DOCUMENTS = [{"text": text} for text in ("a first document, short", "the second one repeats itself, " * 9, "zwölf")]
LOCAL = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/ROWS.jsonl, train: FOLDER/ROWS.jsonl}}
test_split: test
"""
CHOICE = LOCAL.replace("ROWS", "questions") + """
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 2.5}
"""
FEWSHOT = "training_split: train\nnum_fewshot: 2\nfewshot_config: {sampler: first_n}\n"
ROLLING = LOCAL.replace("ROWS", "documents") + """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""
GENERATE = LOCAL.replace("ROWS", "questions") + """
output_type: generate_until
doc_to_text: question
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["?"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Give a folder with tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in {"questions": QUESTIONS, "documents": DOCUMENTS}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in {"choice": CHOICE, "shots": CHOICE + FEWSHOT,
                       "rolling": ROLLING, "generate": GENERATE,
                       "remote": CHOICE.replace("json", "nobody/nothing").replace("dataset_kwargs", "#"),
                       "misspelt": CHOICE.replace("{{question}}", "{{qestion.x}}"),
                       "unsafe": CHOICE + "unsafe_code: true\n",
                       "beyond": CHOICE.replace("label", '"{{choices[7]}}"'),
                       "cut": CHOICE.replace("questions", "cut")}.items():
        (folder / f"{name}.yaml").write_text(text.replace("NAME", name).replace("FOLDER", str(folder)))
    (folder / "cut.jsonl").write_text(json.dumps(QUESTIONS[0])[:-9])
    return folder


def expected(model, tokenizer, shots=""):
    """Compute (acc, acc_norm) of the multiple-choice task from a forward for each choice."""
    hits = torch.zeros(2)
    for row in QUESTIONS:
        likelihoods = [pair_by_hand(model, tokenizer, f"{shots}Q: {row['question']}\nA:", f" {choice}")[0]
                       for choice in row["choices"]]
        normed = [likelihood / len(choice) for likelihood, choice in zip(likelihoods, row["choices"], strict=True)]
        hits += torch.tensor([each.index(max(each)) == row["label"] for each in (likelihoods, normed)])
    return (hits / len(QUESTIONS)).tolist()


def check(found, model, tokenizer):
    """Compare the scores of a record with those computed by hand."""
    shots = "".join(f"Q: {row['question']}\nA: {row['choices'][row['label']]}\n\n" for row in QUESTIONS[:2])
    number = len(QUESTIONS)
    for task, count, text in (("choice", 0, ""), ("shots", 2, shots)):
        acc, norm = expected(model, tokenizer, text)
        errors = [math.sqrt(share * (1 - share) / (number - 1)) for share in (acc, norm)]
        assert found[task] == pytest.approx({
            "acc": acc, "acc_stderr": errors[0], "acc_norm": norm, "acc_norm_stderr": errors[1], "examples": number,
            "num_fewshot": count, "version": 2.5})
    texts = [row["text"] for row in DOCUMENTS]
    longest = position_limit(model.config) or DEFAULT_SEQLEN
    total = sum(text_by_hand(model, tokenizer, text, longest) for text in texts)
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    assert found["rolling"]["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-3)
    assert found["rolling"]["byte_perplexity"] == pytest.approx(
        math.exp(-total / sum(len(text.encode()) for text in texts)), rel=1e-4)
    assert found["rolling"]["examples"] == len(texts)


@pytest.mark.parametrize("name", slow_but(["wide llama"], ["wide opt", "wide llama"]))
def test_scores_are_those_computed_by_hand(name, folder, checkpoint_folder, prune, tmp_path, tokenizer):
    saved, chosen = tmp_path / "saved", f"--eval --tasks choice,shots,rolling --tasks-dir {folder}"
    out = prune(name, chosen, "--dense --sparsity .5 --gmp --save-format sparse --save", saved)  # on disk, pruned, too
    record, pruned = record_of(saved), load.load_model(saved, "auto")
    assert list(record["tasks"]) == ["dense", "magnitude"] and record["versions"]["lm_eval"] == lm_eval.__version__
    check(record["tasks"]["dense"], AutoModelForCausalLM.from_pretrained(checkpoint_folder(name)).eval(), tokenizer)
    check(record["tasks"]["magnitude"], pruned, tokenizer)

    scores = record["tasks"]["dense"]["shots"], record["tasks"]["magnitude"]["shots"]
    cells = [rf"{each['acc']:.4f} ± {each['acc_stderr']:.4f}" for each in scores]
    assert re.search(rf"^shots +acc +8 +2 +2\.5 +{cells[0]} +{cells[1]}$", out, re.MULTILINE)
    assert re.search(r"^task +metric +examples +num_fewshot +version +dense +magnitude$", out, re.MULTILINE)

    prune(name, chosen, "--save", tmp_path / "again", model=saved)  # in memory
    check(record_of(tmp_path / "again")["tasks"]["as given"], pruned, tokenizer)

    def evaluated(packed, **options):
        options |= {"eval": "builtin", "eval_limit": 2, "tasks": "choice,rolling", "tasks_dir": str(folder)}
        model = mixgpt.load(saved, "cpu", packed=packed)[0]
        return mixgpt.prune(model, "builtin", tokenizer, quiet=True, **options).record

    records = [[evaluated(packed)[part] for part in ("perplexity", "tasks", "matrices")] for packed in (True, False)]
    assert records[0] == records[1] and records[0][2][0]["sparsity"] == 0.5
    with pytest.raises(InputError, match="load it with packed=False"):
        evaluated(True, wbits=4)


def test_generation_is_refused_where_memory_does_not_hold_the_model(folder, tokenizer):
    chosen = tasks.load(("generate",), folder)
    tasks.check(chosen, tokenizer, 1, CPU)
    with pytest.raises(InputError, match=r"--tasks generate: generates text, .* 1000000\.0 GB of the model "):
        tasks.check(chosen, tokenizer, 10**15, CPU)
    tasks.check(tasks.load(("choice",), folder), tokenizer, 10**15, CPU)


def test_texts_that_have_no_first_token_are_refused_before_anything_is_pruned(tokenizer):
    empty = SimpleNamespace(instances=[SimpleNamespace(request_type="loglikelihood", args=("", ""))])
    with pytest.raises(InputError, match="--tasks t: computes the likelihood of an empty text"):
        tasks.check({"tasks": {"t": empty}}, tokenizer, 1, CPU)
    with pytest.raises(InputError, match="tokenizer has no token for the begin or the end"):
        tasks.check({"tasks": {}}, SimpleNamespace(bos_token_id=None, eos_token_id=None), 1, CPU)


@pytest.mark.parametrize("options, message", [
    ("remote", r"--tasks remote: cannot be used: .*nobody/nothing.*"),  # whose data is on the hub
    ("misspelt", r"--tasks misspelt: cannot be used: 'qestion' is undefined"),
    ("unsafe", r"--tasks unsafe: cannot be used: .*marked as unsafe"),
    ("beyond", r"--tasks beyond: cannot be used: "), ("cut", r"--tasks cut: cannot be used: .*JSON"),
    ("choice,arc_chalenge", "--tasks arc_chalenge: cannot be used: .*'arc_chalenge' is not a registered task"),
    ("choice --tasks-dir nowhere", "--tasks-dir nowhere: must be a folder with ")])
def test_a_task_that_cannot_be_used_gets_one_line_before_the_work(options, message, folder, prune, tmp_path,
                                                                  monkeypatch):
    manage, asked = tasks.TaskManager, []

    def without_defaults(include_path, include_defaults=True):
        asked.append(include_defaults)
        return manage(include_path=include_path, include_defaults=False)  # those of lm-eval take seconds to index

    monkeypatch.setattr(tasks, "TaskManager", without_defaults)
    line = prune("llama", "--eval --sparsity .5 --save", tmp_path / "saved", "--tasks-dir", folder, "--tasks", options,
                 status=2)
    assert re.fullmatch(rf"llama\.py: error: {message}.*", line.strip())
    assert not list(tmp_path.glob("saved/*.safetensors"))
    assert asked == [False, True] if "arc_chalenge" in options else asked in ([], [False])


def test_without_lm_eval_the_line_says_what_to_install(prune, monkeypatch):
    monkeypatch.delitem(sys.modules, "mixgpt.evaluation.tasks", raising=False)
    monkeypatch.delattr("mixgpt.evaluation.tasks", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    line = prune("llama", "--eval --tasks choice", status=2).splitlines()[-1]
    assert line.startswith("llama.py: error: --tasks: lm-eval cannot be used (") and line.endswith(
        'pip install "mixgpt[eval]", or in a checkout -r requirements-eval.txt')
    prune("llama", "--eval")  # not needed then


def test_processes_share_out_the_texts_and_score_as_one_does(folder, checkpoint_folder, tmp_path, tokenizer, fork):
    arguments = [checkpoint_folder("llama"), "builtin", "--seqlen", "32", "--eval", "--device", "cpu", "--tasks",
                 "choice,shots,rolling", "--tasks-dir", folder, "--save", tmp_path / "two"]
    said, status = run_together(fork, arguments, [tmp_path / "first", tmp_path / "second"])
    assert status == 0 and said[0].count("word_perplexity") == 1 and said[1] == "", said
    assert saved_tensors(tmp_path / "two")
    check(record_of(tmp_path / "two")["tasks"]["dense"],
          AutoModelForCausalLM.from_pretrained(checkpoint_folder("llama")).eval(), tokenizer)
