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

ROOT = Path(__file__).parent.parent
# a changed file may have the size and, in whole seconds, the time of one whose compiled code is there
ENVIRONMENT = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def mutations(words):
    """Yield a dict for each mutation: what, file, -, +, and tests or explained."""
    for block in (Path(__file__).parent / "mutations.txt").read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        if not lines or words and not any(word in block for word in words):
            continue
        mutation = {"what": lines[0], "-": "", "+": ""}
        for key, _, value in (line.partition(" ") for line in lines[1:]):
            if key in "-+":
                mutation[key] += value + "\n"
            else:
                mutation[key.rstrip(":")] = value
        yield mutation | {sign: mutation[sign].removesuffix("\n") for sign in "-+"}


def run(copy, tests):
    """Run tests in the copy. Returns pytest's exit status, and the test that failed first, or its last line."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests], cwd=copy,
                          env=ENVIRONMENT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
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
    with tempfile.TemporaryDirectory(prefix="mutate") as folder:
        copy = Path(folder) / "copy"
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True,
                                text=True, check=True).stdout.splitlines()
        for name in filter(lambda name: (ROOT / name).is_file(), listed):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
        unbroken, said = run(copy, sorted({test for each in chosen for test in each.get("tests", "").split()}))
        if unbroken:
            return f"without a mutation the tests do not pass: {said}"
        for mutation in chosen:
            said = outcome(copy, mutation)
            bad += not said.startswith(("caught", "not run"))
            print(f"{mutation['what']}\n    {said}", flush=True)
    print(f"{len(chosen)} mutations, {bad} of them not caught or not applied")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
