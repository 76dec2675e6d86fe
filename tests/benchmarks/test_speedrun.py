"""Check the line of the benchmark of time to quality."""

import re

import pytest
import speedrun


def test_shares_are_of_the_gap_in_log_perplexity_and_in_kl():
    dense, texts = {"a/wiki.txt": 10.0, "code": 4.0}, ("a/wiki.txt", "code")
    sparsegpt = {"a/wiki.txt": 40.0, "code": 16.0}, dense, dict(zip(texts, (0.8, 1.0), strict=True)), 10.0, "f" * 40
    best = {"a/wiki.txt": 20.0, "code": 4.0}, dense, dict(zip(texts, (0.2, 0.75), strict=True)), 57.0, "f" * 40
    assert speedrun.row_of(sparsegpt, best) == {
        "commit": "f" * 12, "time": "5.7x", "wiki.txt": "50%, KL 0.200 (75%)", "code": "100%, KL 0.750 (25%)"}


@pytest.mark.slow
def test_both_presets_are_run_and_own_text_is_written_anew(checkpoint_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (old := tmp_path / "cache" / "mixgpt" / "text-0.safetensors").parent.mkdir(parents=True)
    old.write_text("")
    assert speedrun.main([str(checkpoint_folder("llama")), "builtin:0.5,self:0.5", "--nsamples", "4", "--seqlen", "32",
                          "--eval", "builtin", "--eval-limit", "4", "--device", "cpu"]) == 0
    header, _, row = capsys.readouterr().out.strip().splitlines()
    assert header == "| commit | time | builtin |"
    assert re.fullmatch(r"\| \w* \| [\d.]+x \| -?\d+%, KL [\d.]+ \(-?\d+%\) \|", row)
    assert not old.exists() and len(list(old.parent.iterdir())) == 1
