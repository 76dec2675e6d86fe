"""Break a copy of this program in one line at a time, and see whether the tests named for it notice.

    python tests/mutate.py [word ...]    # only mutations in whose text one of the words occurs

mutations.txt says how it is broken. The exit status is 1 if tests that must fail pass, or if text to replace is not
there exactly once.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# a changed file may have the size and, in whole seconds, the time of one whose compiled code is there
ENVIRONMENT = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def mutations(words):
    """Yield a dict for each mutation: what, file, -, +, and tests or explained."""
    for block in (HERE / "mutations.txt").read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        if lines and (not words or any(word in block for word in words)):
            mutation = {"what": lines[0]}
            for key, _, value in (line.partition(" ") for line in lines[1:]):
                key = key.rstrip(":")
                mutation[key] = f"{mutation[key]}\n{value}" if key in mutation else value
            yield mutation


def run(copy, tests):
    """Run tests in the copy. Returns pytest's exit status, and the test that failed first, or the last line."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests], cwd=copy,
                          env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.splitlines() or [""]
    failed = [line.split(" - ")[0].removeprefix("FAILED ") for line in lines if line.startswith("FAILED")]
    return done.returncode, (failed or lines)[-1]


def outcome(copy, mutation):
    """Apply a mutation, run its tests, and undo it. Returns a line, which begins with "caught" if all is well."""
    if "explained" in mutation:
        return f"not run: {mutation['explained']}"
    file = copy / mutation["file"]
    before = file.read_text()
    if (count := before.count(mutation["-"])) != 1:
        return f"DOES NOT APPLY: the text to replace is {count} times in {mutation['file']}"
    file.write_text(before.replace(mutation["-"], mutation["+"]))
    status, said = run(copy, mutation["tests"].split())
    file.write_text(before)
    return {0: "NOT CAUGHT", 1: f"caught by {said}"}.get(status, f"CANNOT RUN: {said}")


def main(words):
    chosen, bad = list(mutations(words)), 0
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=HERE.parent, capture_output=True,
                            text=True, check=True).stdout.splitlines()
    with tempfile.TemporaryDirectory(prefix="mutate") as copy:
        for name in filter(lambda name: (HERE.parent / name).is_file(), listed):
            (Path(copy) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(HERE.parent / name, Path(copy) / name)
        status, said = run(copy, sorted({test for each in chosen for test in each.get("tests", "").split()}))
        if status:
            return f"without a mutation the tests do not pass: {said}"
        for mutation in chosen:
            said = outcome(Path(copy), mutation)
            bad += not said.startswith(("caught", "not run"))
            print(f"{mutation['what']}\n    {said}", flush=True)
    print(f"{len(chosen)} mutations, {bad} of them not caught or not applied")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
