"""Text in rows and columns."""

import textwrap

NO_METRICS = ("examples", "num_fewshot", "version")  # keys of a task's results that are not metrics


def table(header, rows):
    """Lay out rows of text under a header, the first column left-aligned, the others right-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def line(cells):
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *others]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def side_by_side(texts, width=100):
    """Lay out {title: text} in adjacent columns, in lines of at most `width` characters."""
    each = (width - 3 * (len(texts) - 1)) // len(texts)
    columns = [[title, "-" * each, *wrapped(text, each)] for title, text in texts.items()]
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return "\n".join(" | ".join(cell.ljust(each) for cell in row).rstrip() for row in rows)


def wrapped(text, width):
    """Return the lines of a text, none longer than `width`."""
    return [part for line in text.strip("\n").expandtabs(4).splitlines()
            for part in textwrap.wrap(line, width, drop_whitespace=False, replace_whitespace=False) or [""]]
