"""Run the tokenizer of a model, which may be damaged or hostile: errors in one line, and a limit to its time."""

import contextlib
import os
import tempfile
import threading

import jinja2

from mixgpt.common.errors import InputError

PATIENCE = 3.0  # seconds for a text, which takes milliseconds, and further ones for a long one:
SLOWEST = 10_000  # characters a second; tokenizers in Python read ten times as many
SAMPLE = ("Names refer to objects; in 2023 there were 12,345 of them.\n\n  Don't they?\n"
          "def name(self):\n    return self._name\n\n" * 20)
ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError)


def rust_error(error):
    """Whether an exception comes from the Rust code of tokenizers: a panic, or an error without a class of its own."""
    return type(error) is Exception or type(error).__name__ == "PanicException"  # a BaseException, in no module


def encode(tokenizer, text, model=None, **options):
    """Return what a tokenizer gives for a text. Raises InputError if it fails or takes longer than any should.

    The time of a regular expression can grow exponentially with the text. model: as the user calls it.
    """
    # not verbose: else it warns that the text exceeds the model's length
    return _limited(lambda: tokenizer(text, verbose=False, **options), len(text), model or tokenizer.name_or_path,
                    "tokenizer", "its regular expressions may be damaged")


def as_texts(rows, tokenizer):
    """Return rows as text: chats, [{"role": …, "content": …}, …], by the tokenizer's chat template, in jinja's sandbox.

    Raises InputError if there is no template, or if it fails or takes longer than any should.
    """
    chats, model = [row for row in rows if not isinstance(row, str)], tokenizer.name_or_path
    if not chats:
        return rows
    if not tokenizer.chat_template:
        raise InputError(f"model {model}: its tokenizer has no chat template, which rows of messages need")

    def render():
        try:
            return [row if isinstance(row, str) else tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
        except jinja2.TemplateError as error:
            raise ValueError(error) from error

    return _limited(render, sum(len(part["content"]) for chat in chats for part in chat), model, "chat template",
                    "it may never end")


def _limited(work, length, model, part, reason):
    """Return what a part of a model's tokenizer gives for a text of this length, within the time that this allows."""
    done = []
    with quiet_panics():
        # a thread, as nothing else can interrupt Rust code; a daemon, so that it does not delay the end of the process
        thread = threading.Thread(target=_run, args=(done, work), daemon=True)
        thread.start()
        thread.join(PATIENCE + length / SLOWEST)
        result = done[0] if done else InputError(
            f"model {model}: its {part} takes longer than {PATIENCE + length / SLOWEST:.0f} s for {length} "
            f"characters; {reason}")
        if isinstance(result, ERRORS) and not isinstance(result, InputError) or rust_error(result):
            raise InputError(f"model {model}: its {part} fails on a text "
                             f"({' '.join(str(result).split())})") from result
        if isinstance(result, BaseException):
            raise result
    return result


def _run(done, work):
    try:
        done.append(work())
    except BaseException as error:  # raised again in the thread that waits
        done.append(error)


def try_out(tokenizer, model):
    """Raise InputError if the tokenizer of a model cannot read an ordinary text, or not in reasonable time."""
    encode(tokenizer, SAMPLE, model)


@contextlib.contextmanager
def quiet_panics():
    """Hold back what is written to the process's stderr, where Rust reports panics; drop it if the block raises."""
    with contextlib.ExitStack() as stack:
        try:
            held, stderr = stack.enter_context(tempfile.TemporaryFile()), os.dup(2)
        except OSError:  # no room for the file, or stderr is closed
            yield
            return
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        held.seek(0)
        if written := held.read():
            os.write(2, written)
